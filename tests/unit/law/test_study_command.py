"""What `minima law study` is asked, and its exit code."""

from pathlib import Path

import pytest

from minima import cli, console
from minima.law.study import running as driver
from minima.law.study.recipe import load_study
from minima.law.study.worker_pool import Tally
from tests.unit.law.study_grid import finish, study_file


class Idle:
    """A pool whose workers all end with nothing more to do, and leave some runs behind."""

    left = 0

    def __init__(self, units, *given) -> None:
        self.units = units[: len(units) - self.left]

    def run(self) -> Tally:
        for unit in self.units:
            finish(unit)
        return Tally(done={unit.name for unit in self.units})


@pytest.mark.parametrize(("left", "code"), [(0, 0), (2, driver.FAILED)])
def test_runs_that_are_left_undone_are_no_success(tmp_path, monkeypatch, left, code):
    monkeypatch.setattr(driver, "Pool", Idle)
    monkeypatch.setattr(Idle, "left", left)
    said: list[str] = []
    path = study_file(tmp_path, output=str(tmp_path / "runs"))
    assert driver.study(path, [], said.append, workers=1) == code
    assert ("left undone: cells/" in said[-1]) == (left > 0)


def test_on_a_terminal_the_overview_is_redrawn_in_its_place(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr(driver, "overview", lambda own, units, tally: f"{len(tally.done)} done\nof 2")
    own = load_study(study_file(tmp_path, output=str(tmp_path)))
    live = driver._Live(own, [], console.write)
    for done in (set[str](), {"a"}, {"a", "b"}):
        live.show(Tally(done=done))
    again = "\x1b[2F\x1b[J"
    assert capsys.readouterr().out == f"0 done\nof 2\n{again}1 done\nof 2\n{again}2 done\nof 2\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "0"], "--workers 0"),
        (["--workers", "-1"], "--workers -1"),
        (["--dry-run", "--collect"], "--dry-run and --collect together"),
        (["--dry-run", "--runs", "data/corpus"], "--dry-run and --runs together"),
        (["--collect", "--cluster", "c.yaml"], "--collect and --cluster together"),
        (["--collect", "--workers", "2"], "--collect and --workers together"),
    ],
)
def test_what_cannot_be_asked_is_refused(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["law", "study", str(study_file(tmp_path)), *options]) == cli.USER_ERROR
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()

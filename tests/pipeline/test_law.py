"""The smallest study from its YAML to its figure: ended half-way, taken up again, fitted, plotted."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.ranks
ROOT = Path(__file__).parents[2]
RUN = "runs/law-small"
CELLS = 40  # (2 students x 3 teachers x 3 starts + 2 alone) x 2 seeds


class Place:
    """A folder that a user works in, outside of the clone."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run_folder = folder, folder / RUN
        self.environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}

    def start(self, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "minima", "law", *arguments]
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *arguments: str) -> str:
        process = self.start(*arguments)
        output = process.communicate(timeout=550)[0]
        assert process.returncode == 0, output[-4000:]
        return output

    def finished(self) -> dict[str, int]:
        """When each finished stage's manifest was written."""
        paths = [*self.run_folder.glob("*/*/*/manifest.json")]
        return {str(path.relative_to(self.run_folder)): path.stat().st_mtime_ns for path in paths}

    def rows(self) -> list[dict[str, str]]:
        with open(self.run_folder / "results.csv", newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The study, ended once some cells are finished and others are being trained, and taken up again."""
    place = Place(tmp_path_factory.mktemp("law"))
    process = place.start("study", "law-small", "--workers", "2")
    deadline = time.monotonic() + 400
    while sum("cells" in name and "quality" in name for name in place.finished()) < 12:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-4000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    place.first_output = process.communicate(timeout=60)[0]
    place.first_code = process.returncode
    place.when_ended = place.finished()
    place.rows_when_ended = place.rows()
    place.second_output = place.run("study", "law-small", "--workers", "2")
    return place


def test_a_signal_ends_it_with_a_table_of_what_is_finished(place):
    assert place.first_code == 128 + signal.SIGTERM, place.first_output[-3000:]
    assert "the same command continues" in place.first_output
    assert 12 <= len(place.rows_when_ended) < CELLS


def test_the_second_start_redoes_nothing(place):
    after = place.finished()
    assert {name: after[name] for name in place.when_ended} == place.when_ended
    assert len(after) > len(place.when_ended)


def test_every_cell_is_in_the_table_with_its_losses(place):
    rows = place.rows()
    assert len(rows) == CELLS
    for row in rows:
        assert 2.0 < float(row["student_loss"]) < 6.0 and int(row["tokens"]) == 61_440
        assert int(row["tokens"]) >= 10 * int(row["student_non_embedding_parameters"])
        assert (row["teacher"] == "") == (row["initialisation"] == "direct")
        if row["teacher"]:
            assert int(row["student_non_embedding_parameters"]) < int(row["teacher_non_embedding_parameters"])
            assert 0 < float(row["kl"]) < 2 and 2.0 < float(row["teacher_loss"]) < 6.0


def test_a_seed_changes_teachers_and_students(place):
    losses = {(row["student"], row["teacher"], row["initialisation"], row["seed"]): row for row in place.rows()}
    for (student, teacher, start, seed), row in losses.items():
        other = losses[student, teacher, start, "2" if seed == "1" else "1"]
        assert row["student_loss"] != other["student_loss"]
        assert not teacher or row["teacher_loss"] != other["teacher_loss"]


def test_scores_were_measured_once_for_each_teacher_and_seed(place):
    scored = [json.loads(path.read_text()) for path in place.run_folder.glob("teachers/*/scores/manifest.json")]
    assert len(scored) == 6 and all(manifest["metrics"]["scored_micro_batches"] == 8 for manifest in scored)
    for path in place.run_folder.glob("cells/*/pruned/manifest.json"):
        assert any("scores" in name for name in json.loads(path.read_text())["inputs"])


def test_starting_workers_is_a_small_share_and_said(place):
    for output in (place.first_output, place.second_output):
        assert "starting workers took" in output and "% over" not in output
    assert len(list(place.run_folder.glob("logs/worker-*.log"))) <= 2


def test_a_third_start_makes_no_run(place):
    before = place.finished()
    output = place.run("study", "law-small")
    assert "47 runs done, 0 running, 0 left" in output and place.finished() == before


def test_the_table_is_fitted_and_plotted(place):
    table = f"{RUN}/results.csv"
    assert "pruned_from_teacher" in place.run("fit", table)
    place.run("plot", table, "--output", "figure")
    assert list(place.folder.glob("figure*"))

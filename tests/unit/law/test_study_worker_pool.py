"""The queue of a study's runs, with workers that train nothing."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from minima.law.study import worker_pool
from minima.law.study.worker_pool import Pool, Tally, ready_units
from tests.unit.law.study_grid import study_of

pytestmark = pytest.mark.slow  # most start processes

# Makes a run by writing its manifests: at once, after a while, or not at all, as a file of its folder says.
WORKER = """
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.unit.law.study_grid import finish
from minima.law.study.grid import expand
from minima.law.study.recipe import load_study
folder = Path({folder!r})
units = {{unit.name: unit for unit in expand(load_study(folder / "tiny.yaml"), folder / "tiny.yaml")}}
if (folder / "broken").exists():
    sys.exit("minima: RecipeError: this worker cannot start")
(folder / f"gpu-{{os.getpid()}}").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
print("== run ready", flush=True)
for line in sys.stdin:
    name = line.strip()
    print("== run begun", name, flush=True)
    with open(folder / "made.txt", "a") as file:
        file.write(f"{{os.getpid()}} {{name}}\\n")
    print("making", name, flush=True)
    if (folder / "wait").exists() and name == (folder / "wait").read_text():
        time.sleep(60)
    if (folder / "fail").exists() and name == (folder / "fail").read_text():
        print("minima: DataError: no text\\n  why it matters: none", flush=True)
        sys.exit(2)
    time.sleep(0.05)  # long enough for the other worker to begin
    finish(units[name])
    print("== run done", name, "0.1", flush=True)
"""


class Place:
    """A study's folder, and its driver in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.study, self.units = study_of(folder)
        root = str(Path(__file__).parents[3])
        (folder / "worker.py").write_text(WORKER.format(root=root, folder=str(folder)))
        self.seen: list[tuple[int, int]] = []

    def run(self, workers: int = 2, show=None) -> Tally:
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT)

        def see(tally: Tally) -> None:
            self.seen.append((len(tally.done), len(tally.running)))
            if show is not None:
                show(tally)

        try:
            command = [sys.executable, str(self.folder / "worker.py")]
            return Pool(self.units, command, workers, self.folder / "logs", lock, see).run()
        finally:
            os.close(lock)

    def made(self) -> list[tuple[str, str]]:
        path = self.folder / "made.txt"
        return [tuple(line.split()) for line in path.read_text().splitlines()] if path.is_file() else []  # type: ignore


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def test_the_cheapest_run_whose_inputs_are_there_comes_first(place):
    tally = Tally()
    assert [unit.name for unit in ready_units(place.units, tally)] == ["data/corpus"]
    tally.done.add("data/corpus")
    names = [unit.name for unit in ready_units(place.units, tally)]
    assert {name.split("/")[0] for name in names} == {"teachers", "cells"}  # those of `direct` need no teacher
    flops = {unit.name: unit.flops for unit in place.units}
    assert [flops[name] for name in names] == sorted(flops[name] for name in names)
    tally.running.add(names[0])
    tally.failed[names[1]] = "why"
    assert [unit.name for unit in ready_units(place.units, tally)] == names[2:]


def test_every_run_is_made_once_by_few_processes(place, monkeypatch):
    monkeypatch.setattr(worker_pool, "num_accelerators", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 7")
    tally = place.run()
    made = place.made()
    assert sorted(name for _, name in made) == sorted(unit.name for unit in place.units)
    assert tally.done == {unit.name for unit in place.units} and not tally.failed and tally.made == len(made)
    assert len({process for process, _ in made}) <= 2
    assert sorted(path.read_text() for path in place.folder.glob("gpu-*")) == ["4", "7"], "each has one of its own"
    order = [name for _, name in made]
    for unit in place.units:
        assert all(order.index(need) < order.index(unit.name) for need in unit.needs)
    assert 0 < tally.startup_seconds < tally.worker_seconds and "%" in tally.startup_line()
    assert max(running for _, running in place.seen) == 2
    log = place.folder / "logs" / "teachers" / "small-seed1.log"
    assert log.read_text() == "making teachers/small-seed1\n"


def test_what_is_finished_is_not_made_again(place):
    place.run()
    before = len(place.made())
    assert place.run().made == 0 and len(place.made()) == before


def test_a_run_that_fails_ends_what_reads_it_and_nothing_else(place):
    (place.folder / "fail").write_text("teachers/small-seed1")
    tally = place.run()
    assert tally.failed == {"teachers/small-seed1": "DataError: no text"}
    left = {unit.name for unit in place.units} - tally.done - set(tally.failed)
    assert left == {unit.name for unit in place.units if "teachers/small-seed1" in unit.needs}
    (place.folder / "fail").unlink()
    assert not place.run().failed


def test_workers_that_cannot_start_are_not_started_for_ever(place):
    (place.folder / "broken").touch()
    tally = place.run()
    assert set(tally.failed.values()) == {"RecipeError: this worker cannot start"} and not tally.done


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_workers_and_the_next_start_goes_on(place, number):
    under_nohup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    (place.folder / "wait").write_text("teachers/large-seed1")
    began, timers = time.monotonic(), []

    def stop(tally: Tally) -> None:
        if "teachers/large-seed1" in tally.running and not timers:
            timers.append(threading.Timer(0.2, os.kill, (os.getpid(), number)))
            timers[0].start()

    tally = place.run(show=stop)
    assert tally.stopped == number and time.monotonic() - began < 30
    assert not tally.failed and not tally.running and "teachers/large-seed1" not in tally.done
    (place.folder / "wait").unlink()
    done, before = set(tally.done), place.made()
    assert place.run().done == {unit.name for unit in place.units}
    assert not done & {name for _, name in place.made()[len(before) :]}
    assert signal.getsignal(number) == signal.SIG_DFL
    signal.signal(signal.SIGHUP, under_nohup)


def test_a_signal_that_comes_while_workers_are_started_is_not_lost(place, monkeypatch):
    start = Pool._start

    def interrupted(pool: Pool) -> None:
        if not pool.tally.stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        start(pool)

    monkeypatch.setattr(Pool, "_start", interrupted)
    tally = place.run()
    assert tally.stopped == signal.SIGTERM and not tally.done and not tally.failed


def test_a_log_that_cannot_be_written_hangs_nothing(place, caplog):
    (place.folder / "logs").mkdir()
    (place.folder / "logs" / "teachers").write_text("a file where the logs' folder should be")
    tally = place.run()
    assert tally.done == {unit.name for unit in place.units} and not tally.failed
    assert "teachers/small-seed1.log cannot be written" in caplog.text
    assert (place.folder / "logs" / "data" / "corpus.log").read_text() == "making data/corpus\n"


def test_a_line_that_looks_like_an_event_hangs_nothing(place):
    worker = place.folder / "worker.py"
    worker.write_text(
        worker.read_text().replace('print("making", name', 'print("== run ", flush=True)\n    print("making", name')
    )
    assert place.run().done == {unit.name for unit in place.units}

"""A build of DeepSpeed's op that was killed must not hold up a later process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minima.engine import ops

# Holds the op's folder as a builder does that takes long, and leaves PyTorch's lock there when it is killed.
BUILDING = """
import sys, time
from pathlib import Path
from minima.engine import ops

class Builder:
    name = "some_op"
    def load(self, verbose):
        (Path(sys.argv[1]) / "lock").touch()
        print("building", flush=True)
        time.sleep(60)

ops._get_build_directory = lambda name, verbose: sys.argv[1]
ops.sys.prefix = str(Path(sys.argv[1]).parent)
ops.load_op(Builder())
"""


class Builder:
    name = "some_op"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.met_a_lock: bool | None = None

    def load(self, verbose: bool) -> str:
        self.met_a_lock = (self.folder / "lock").exists()
        return "the module"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    (folder := tmp_path / "some_op").mkdir()
    monkeypatch.setattr(ops, "_get_build_directory", lambda name, verbose: str(folder))
    return folder


def mine(folder: Path, monkeypatch) -> None:
    """The folder is one of minima's own environment, where nobody else builds."""
    monkeypatch.setattr(ops.sys, "prefix", str(folder.parent))


def test_a_lock_that_a_killed_build_left_is_removed_at_once(folder, monkeypatch, caplog):
    mine(folder, monkeypatch)
    (beside := folder.with_name("pin_memory")).mkdir()  # which DeepSpeed builds with that for asynchronous I/O
    for built in (folder, beside):
        (built / "lock").touch()
    builder = Builder(folder)
    assert ops.load_op(builder) == "the module"
    assert builder.met_a_lock is False and not (beside / "lock").exists()
    assert "left behind by a killed build" in caplog.text


def test_a_living_build_is_waited_for_and_one_that_is_killed_no_longer(folder, monkeypatch, caplog):
    mine(folder, monkeypatch)
    monkeypatch.setattr(ops, "_SAY_AFTER_SECONDS", 0.0)
    with subprocess.Popen([sys.executable, "-c", BUILDING, str(folder)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"building\n"
        killer = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -{signal.SIGKILL.value} {other.pid}"])
        builder = Builder(folder)
        ops.load_op(builder)
        assert other.wait(timeout=30) == -signal.SIGKILL
        killer.wait()
    assert builder.met_a_lock is False
    assert "waiting for another process" in caplog.text


def test_in_a_folder_of_others_a_young_lock_is_waited_for_and_an_old_one_removed(folder, monkeypatch, caplog):
    lock = folder / "lock"
    lock.touch()

    def sleep(seconds: float) -> None:  # until nobody can be building any more
        assert lock.exists()
        old = time.time() - ops._LONGEST_BUILD_SECONDS - 1
        os.utime(lock, (old, old))

    monkeypatch.setattr(ops.time, "sleep", sleep)
    builder = Builder(folder)
    ops.load_op(builder)
    assert builder.met_a_lock is False
    assert "waiting for another program" in caplog.text and "removed" in caplog.text


def test_without_a_lock_nothing_is_said(folder, monkeypatch, caplog):
    mine(folder, monkeypatch)
    ops.load_op(Builder(folder))
    ops.load_op(Builder(folder))
    assert not caplog.text


def test_an_op_loads_where_no_lock_can_be_made(tmp_path, monkeypatch):
    folder = tmp_path / "none" / "some_op"
    monkeypatch.setattr(ops, "_get_build_directory", lambda name, verbose: str(folder))
    assert ops.load_op(Builder(folder)) == "the module"

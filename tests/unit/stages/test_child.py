"""Whom a signal to the driver reaches: the ranks, and no launcher that would end them before they have saved."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minima.stages.child import signal_ranks

RANK = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\nprint('up', flush=True)\n"
RANK += "time.sleep(30)\n"


def launcher(tmp_path: Path, name: str, body: str) -> subprocess.Popen:
    """A program called `name` in a session of its own, with PATH beginning where it lies."""
    program = tmp_path / name
    program.write_bytes(Path("/bin/bash").read_bytes())  # a process is called by its file, and a script by its shell
    program.chmod(0o755)
    return subprocess.Popen(
        [str(program), "-c", body, name], start_new_session=True, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHON": sys.executable, "CODE": RANK},
    )  # fmt: skip


def test_the_ranks_get_it_and_their_launcher_does_not(tmp_path):
    body = 'trap "echo launcher told" TERM; RANK=0 "$PYTHON" -c "$CODE" minima stage & wait $!; echo "rank left $?"'
    child = launcher(tmp_path, "torchrun", body)
    assert child.stdout is not None and child.stdout.readline() == "up\n"
    signal_ranks(child.pid, signal.SIGTERM)
    assert child.communicate(timeout=10)[0] == "rank left 7\n"


def test_where_no_rank_is_there_the_whole_session_gets_it(tmp_path):
    child = launcher(tmp_path, "starting", "echo up; read -r -t 30 <> <(:)")
    assert child.stdout is not None and child.stdout.readline() == "up\n"
    signal_ranks(child.pid, signal.SIGTERM)
    assert child.wait(timeout=10) == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ranks_of_srun_are_told_by_slurm_since_srun_would_kill_them(tmp_path, monkeypatch, number):
    (tmp_path / "scancel").write_text(f'#!/bin/sh\necho "$@" > "{tmp_path}/told"\n')
    (tmp_path / "scancel").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    child = launcher(tmp_path, "srun", "echo up; read -r -t 30 <> <(:)")
    assert child.stdout is not None and child.stdout.readline() == "up\n"
    signal_ranks(child.pid, number)
    time.sleep(0.2)
    assert child.poll() is None, "srun itself got nothing"
    assert (tmp_path / "told").read_text() == f"--signal={number.name[3:]} 77\n"
    child.kill()
    child.wait()

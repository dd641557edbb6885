"""`tools/check_gpu.sh` with a stand-in for Python, which writes down what it was asked for."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "tools" / "check_gpu.sh"
PYTHON = """#!/bin/sh
case "$*" in
    *num_accelerators*) exit {no_gpu} ;;
    *tests/gpu*) echo "$$ 3 passed"; exit 0 ;;
    *offload*) exec sleep 60 ;;
    *) echo "$*"; exit 1 ;;
esac
"""


@pytest.fixture
def check(tmp_path):
    def run(*arguments, no_gpu=0):
        python = tmp_path / "python"
        python.write_text(PYTHON.format(no_gpu=no_gpu))
        python.chmod(0o755)
        command = [SCRIPT, "-o", tmp_path / "out", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "PYTHON": python})

    return run


@pytest.mark.slow
def test_each_step_is_told_with_its_exit_code_and_the_time_is_kept(check, tmp_path):
    done = check("-s", "20", "doctor", "offload", "loss", "tests")
    assert done.returncode == 1, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("== ")]
    assert told == ["== doctor: 1", "== offload: ended: no time left", "== loss: no time left", "== tests: 0"]
    assert "3 passed" in done.stdout
    assert "-m minima doctor" in (tmp_path / "out" / "doctor.log").read_text()


def test_all_well_is_exit_code_0(check):
    assert check("tests", "walls").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "no_gpu", "told"),
    [
        (["tests"], 1, "no GPU is visible"),
        (["nonsense"], 0, "'nonsense'"),
        (["-s", "1.5", "tests"], 0, "whole seconds"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_runs(check, tmp_path, arguments, no_gpu, told):
    done = check(*arguments, no_gpu=no_gpu)
    assert done.returncode == 2
    assert told in done.stderr
    assert not list((tmp_path / "out").glob("*.log"))

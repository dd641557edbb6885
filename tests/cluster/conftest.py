"""A real Slurm of two nodes for the tests of this folder, and one chain of jobs that they share."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm

_PROGRAMS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}


@pytest.fixture(scope="session")
def slurm(root: Path) -> Iterator[Slurm]:
    """The development cluster: the one that runs, or one that is started here and stopped at the end."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    missing = [package for program, package in _PROGRAMS.items() if not shutil.which(program, path=path)]
    if missing:
        reason = f"no Slurm here: apt-get install {' '.join(missing)}"
        if "CI" in os.environ:  # where it counts, it may not be skipped
            pytest.fail(reason)
        pytest.skip(reason)
    tool = root / "tools" / "dev_cluster.sh"
    started = subprocess.run([tool, "start"], capture_output=True, text=True, timeout=120)
    assert started.returncode == 0, started.stdout + started.stderr
    exported = subprocess.run([tool, "env"], capture_output=True, text=True, timeout=10, check=True).stdout
    printed = subprocess.run(
        ["bash", "-c", f'{exported}\nprintf %s "$SLURM_CONF"'], capture_output=True, text=True, check=True
    )
    try:
        yield Slurm(Path(printed.stdout), path)
    finally:
        if "already running" not in started.stdout:
            subprocess.run([tool, "stop"], check=True, timeout=120)

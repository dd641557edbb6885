"""What tools/dev_cluster.sh promises to the person who calls it."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm, wait_for

pytestmark = pytest.mark.ranks


def call(root, *arguments, folder=None):
    environment = os.environ | ({} if folder is None else {"MINIMA_DEV_CLUSTER": str(folder)})
    return subprocess.run(
        [root / "tools" / "dev_cluster.sh", *arguments], env=environment, capture_output=True, text=True, timeout=60
    )


def test_a_second_start_says_that_it_runs_and_changes_nothing(slurm, root):
    before = slurm.conf.read_text()
    again = call(root, "start")
    assert again.returncode == 0 and "already running" in again.stdout and slurm.conf.read_text() == before


def test_both_nodes_run_a_task_of_one_job(slurm):
    assert set(slurm.nodes()) == {"n1", "n2"}
    printed = slurm.call("srun", "--nodes=2", "sh", "-c", 'echo "$SLURMD_NODENAME"')
    assert sorted(printed.split()) == ["n1", "n2"]


def test_no_cgroup_is_asked_for(slurm):
    """From 24.05 on a file may say so, and 26.05 starts nothing where neither a cgroup nor that file is."""
    version = subprocess.run(["slurmd", "-V"], env=slurm.environment, capture_output=True, text=True, check=True).stdout
    knows = tuple(map(int, version.split()[-1].split(".")[:2])) >= (24, 5)
    said = slurm.conf.with_name("cgroup.conf")
    assert (said.read_text() == "CgroupPlugin=disabled\n") if knows else not said.exists()


@pytest.fixture
def folder():
    """A short path that anybody may look into, as munge wants for its socket."""
    folder = Path(tempfile.mkdtemp(prefix="minima-dc-"))
    folder.chmod(0o755)
    yield folder / "c"
    shutil.rmtree(folder)


def test_one_that_was_killed_is_started_anew_and_stops_with_all_that_it_left(slurm, root, folder):
    try:
        assert call(root, "start", folder=folder).returncode == 0
        other = Slurm(folder / "slurm.conf", slurm.environment["PATH"])
        other.call("sbatch", "--output=/dev/null", "--wrap", "srun sleep 1000")
        wait_for("process of the job", lambda: len(processes_of(folder)) > 3)
        for path in folder.glob("*.pid"):
            os.kill(int(path.read_text()), signal.SIGKILL)
        again = call(root, "start", folder=folder)
        assert again.returncode == 0 and "started" in again.stdout, again.stderr
        assert set(other.nodes().values()) == {"idle"} and other.call("squeue", "--noheader") == ""
    finally:
        stopped = call(root, "stop", folder=folder)
    assert stopped.returncode == 0 and not (folder / "slurm.conf").exists()
    assert processes_of(folder) == []


def processes_of(folder):
    mine, found = f"SLURM_CONF={folder}/slurm.conf".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            found += [path.parent.name] if mine in path.read_bytes().split(b"\0") else []
    return found


def test_what_it_cannot_use_is_refused(root, tmp_path):
    refused = call(root, "start", folder=tmp_path / "a b")
    assert refused.returncode == 2 and "without spaces" in refused.stderr
    assert call(root, "env", folder=tmp_path / "none").returncode == 2


def test_missing_packages_are_named(root, tmp_path):
    for program in ("bash", "env", "id"):
        (tmp_path / program).symlink_to(shutil.which(program))
    refused = subprocess.run(
        [root / "tools" / "dev_cluster.sh", "start"], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert refused.returncode == 2 and "missing Debian packages: slurm-client\n" in refused.stderr

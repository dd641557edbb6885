"""What tools/dev_cluster.sh promises to the person who calls it."""

import os
import subprocess

import pytest

pytestmark = pytest.mark.ranks


def call(root, *arguments, folder=None):
    environment = os.environ | ({} if folder is None else {"MINIMA_DEV_CLUSTER": str(folder)})
    return subprocess.run(
        [root / "tools" / "dev_cluster.sh", *arguments], env=environment, capture_output=True, text=True, timeout=60
    )


def test_a_second_start_says_that_it_runs_and_changes_nothing(slurm, root):
    before = slurm.conf.read_text()
    again = call(root, "start")
    assert again.returncode == 0 and "runs already" in again.stdout and slurm.conf.read_text() == before


def test_both_nodes_run_a_task_of_one_job(slurm):
    assert set(slurm.nodes()) == {"n1", "n2"}
    printed = slurm.call("srun", "--nodes=2", "sh", "-c", 'echo "$SLURMD_NODENAME"')
    assert sorted(printed.split()) == ["n1", "n2"]


def test_one_that_was_killed_is_started_anew_and_stops_with_all_that_it_left(slurm, root, tmp_path):
    folder = tmp_path / "c"
    try:
        assert call(root, "start", folder=folder).returncode == 0
        other = type(slurm)(folder / "slurm.conf", slurm.environment["PATH"])
        other.call("sbatch", "--output=/dev/null", "--wrap", "srun sleep 1000")
        for path in folder.glob("*.pid"):
            subprocess.run(["kill", "-9", path.read_text().strip()], check=True)
        assert "started" in call(root, "start", folder=folder).stdout
        assert set(other.nodes().values()) == {"idle"}
    finally:
        stopped = call(root, "stop", folder=folder)
    assert stopped.returncode == 0 and not (folder / "slurm.conf").exists()
    mine = f"SLURM_CONF={folder}/slurm.conf".encode()
    left = subprocess.run(["grep", "-l", "-a", "-s", "-e", mine, "-r", "/proc", "--include=environ"], capture_output=True)
    assert left.stdout == b""


def test_what_it_cannot_use_is_refused(root, tmp_path):
    refused = call(root, "start", folder=tmp_path / "a b")
    assert refused.returncode == 2 and "without spaces" in refused.stderr
    assert call(root, "env", folder=tmp_path / "none").returncode == 2
    bare = subprocess.run(
        ["bash", "-c", "PATH=/nowhere; shopt -s expand_aliases; . /dev/stdin"], input="", capture_output=True
    )
    assert bare.returncode == 0

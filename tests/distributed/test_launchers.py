"""Real launchers start two real ranks, which find each other: `minima doctor` under each, and a stage under mpirun."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from minima.launcher import child_environment, free_port
from minima.stages.manifest import is_finished

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.ranks
DOCTOR = ["minima", "doctor", "--folder", "runs"]


def run(command, folder, **variables):
    environment = child_environment(2) | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    environment.pop("MINIMA_DRIVER")
    environment |= variables
    (folder / "runs").mkdir(exist_ok=True)  # the doctor makes none
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout + done.stderr


def checks(output: str) -> dict[str, str]:
    """The lines of the doctor's table: the state of each check and what it found."""
    found = {}
    for line in output.splitlines():
        state, _, rest = line.partition(" ")
        if state in ("ok", "warning", "FAILED"):
            found[rest.strip().partition("  ")[0]] = " ".join([state, *rest.strip().partition("  ")[2].split()])
    return found


def assert_well(code: int, output: str, ranks: str) -> None:
    assert code == 0, output
    found = checks(output)
    assert "2 ranks on 1 machine" in output and output.count("minima doctor:") == 1, output
    assert found["ranks"].startswith(ranks) and "2 on " in found["ranks"], output
    assert found["all-reduce"].startswith("ok gloo: correct; 4 KiB in") and found["all-reduce"].endswith(
        "GB/s per rank"
    )
    assert found["shared folder"].startswith("ok all ranks see it")
    assert found["locks between machines"].startswith("ok") and found["clocks"].startswith("ok"), output


@pytest.fixture(scope="module")
def mpirun():
    """How Open MPI starts two ranks here."""
    if shutil.which("mpirun") is None:
        message = "install the Debian packages openmpi-bin and libopenmpi-dev"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    root = ["--allow-run-as-root"] if os.getuid() == 0 else []
    return ["mpirun", *root, "-np", "2", "--oversubscribe", "--bind-to", "none"]


def test_mpirun_tells_ranks_on_two_machines_where_rank_0_is(mpirun, tmp_path):
    # Each rank is told that it is the only one on its machine, so they ask mpi4py as ranks on two machines do.
    alone = ["env", "OMPI_COMM_WORLD_LOCAL_RANK=0", "OMPI_COMM_WORLD_LOCAL_SIZE=1"]
    code, output = run([*mpirun, *alone, sys.executable, "-m", *DOCTOR], tmp_path)
    assert_well(code, output, "warning")
    assert "rank 0 was told a different number" in output, "the doctor counts the ranks of a machine itself"


def test_a_stage_under_mpirun(mpirun, tmp_path):
    corpus = {"name": "corpus", "kind": "build_data", "sources": [{"embedded": "sotu", "max_documents": 20}]}
    corpus |= {"tokenizer": {"vocabulary_size": 400}, "sequence_length": 64, "processes": 1, "held_out_fraction": 0}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"name": "x", "stages": [corpus]}))
    launcher = ["bash", str(ROOT / "launch/mpirun.sh"), "recipe.yaml"]
    code, output = run(launcher, tmp_path, MINIMA_RANKS="2")
    assert code == 0 and output.startswith("+ mpirun "), output
    assert output.count("== stage corpus") == 1 and is_finished(tmp_path / "runs/x/corpus")
    code, output = run([*launcher, "stages.corpus.sequence_length=128"], tmp_path, MINIMA_RANKS="2")
    assert code == 2 and "StageError" in output, "the ranks' exit code is the launcher's"


def test_doctor_under_torchrun(tmp_path):
    where = ["--nnodes", "1", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    assert_well(*run(["torchrun", *where, "--module", *DOCTOR], tmp_path), "ok")


def test_doctor_under_deepspeed(tmp_path):
    where = ["--num_gpus", "2", "--master_addr", "127.0.0.1", "--master_port", str(free_port()), "--no_local_rank"]
    assert_well(*run(["deepspeed", *where, "--log_level", "error", "--module", *DOCTOR], tmp_path), "ok")

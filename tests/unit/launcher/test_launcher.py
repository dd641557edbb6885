"""Every launcher's variables, and what happens when they are partial or impossible."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minima import launcher
from minima.errors import LauncherError
from minima.launcher import Launch, child_environment, read_launch, submitting_environment
from minima.nodes import first_host

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "7",
}  # fmt: skip
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "b", "MASTER_PORT": "8",
}  # fmt: skip
SLURM = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4,3", "SLURM_STEP_NODELIST": "gpu[03-05,9],cpu1", "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
}  # fmt: skip


def test_no_launcher_is_one_process():
    launch = read_launch({})
    assert (launch.rank, launch.world_size, launch.local_rank, launch.local_world_size) == (0, 1, 0, 1)
    assert 0 < launch.master_port < 65536


def test_torchrun():
    assert read_launch(TORCHRUN) == Launch(3, 4, 1, 2, "a", 7)


def test_deepspeed_says_local_size():
    environment = {key: value for key, value in TORCHRUN.items() if key != "LOCAL_WORLD_SIZE"} | {"LOCAL_SIZE": "2"}
    assert read_launch(environment).local_world_size == 2


def test_openmpi():
    assert read_launch(OPENMPI) == Launch(1, 2, 1, 2, "b", 8)


def test_slurm_finds_its_master():
    launch = read_launch(SLURM)
    assert (launch.rank, launch.world_size, launch.local_rank, launch.local_world_size) == (5, 7, 1, 3)
    assert launch.master_address == "gpu03"
    assert launch.master_port == read_launch(SLURM | {"SLURM_PROCID": "6", "SLURM_LOCALID": "2"}).master_port
    assert launch.master_port != read_launch(SLURM | {"SLURM_JOB_ID": "78"}).master_port


def test_precedence():
    assert read_launch(SLURM | OPENMPI | TORCHRUN).master_address == "a"
    assert read_launch(SLURM | OPENMPI).master_address == "b"


def test_slurm_outside_a_step_of_many_tasks_is_one_process():
    batch = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "77", "SLURM_NTASKS": "8"}
    assert read_launch(batch).world_size == 1
    assert read_launch(batch | {"SLURM_STEP_NUM_TASKS": "1"}).world_size == 1


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_partial_set_is_refused_by_name(missing):
    environment = {key: value for key, value in TORCHRUN.items() if key != missing}
    with pytest.raises(LauncherError, match=f"without {missing}"):
        read_launch(environment)


@pytest.mark.parametrize("missing", ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"])
def test_partial_openmpi_is_refused_by_name(missing):
    with pytest.raises(LauncherError, match=missing):
        read_launch({key: value for key, value in OPENMPI.items() if key != missing})


def test_partial_slurm_is_refused_by_name():
    with pytest.raises(LauncherError, match="SLURM_PROCID"):
        read_launch({key: value for key, value in SLURM.items() if key != "SLURM_PROCID"})


@pytest.mark.parametrize(
    "wrong",
    [
        {"RANK": "4"},
        {"RANK": "-1"},
        {"WORLD_SIZE": "0"},
        {"LOCAL_RANK": "2"},
        {"LOCAL_WORLD_SIZE": "5"},
        {"RANK": "0", "LOCAL_RANK": "1"},
        {"RANK": "one"},
        {"MASTER_PORT": "70000"},
    ],
)
def test_impossible_values_are_refused(wrong):
    with pytest.raises(LauncherError, match=next(iter(wrong))):
        read_launch(TORCHRUN | wrong)


@pytest.mark.parametrize("empty", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_an_empty_variable_is_a_missing_one(empty):
    """As `export RANK=$SLURM_PROCID` leaves it outside of a step: every process would be rank 0."""
    with pytest.raises(LauncherError, match=rf"without {empty} \({empty} being empty\)"):
        read_launch(TORCHRUN | {empty: ""})
    assert read_launch(dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK"), "")).world_size == 1


@pytest.mark.parametrize(
    "wrong", [{"MASTER_PORT": "99999"}, {"MASTER_PORT": "-5"}, {"RANK": "0_0"}, {"LOCAL_RANK": "\u0660"}]
)
def test_one_rank_is_checked_as_many_are(wrong):
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    assert read_launch(one | {"MASTER_PORT": "29500"}).master_port == 29500
    with pytest.raises(LauncherError, match=next(iter(wrong))):
        read_launch(one | wrong)


@pytest.mark.parametrize("tasks", ["0", "-2"])
def test_a_step_of_no_tasks_is_impossible(tasks):
    with pytest.raises(LauncherError, match=f"SLURM_STEP_NUM_TASKS={tasks}"):
        read_launch(SLURM | {"SLURM_STEP_NUM_TASKS": tasks})


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_many_ranks_need_an_address(missing):
    with pytest.raises(LauncherError, match=f"{missing}=missing"):
        read_launch({key: value for key, value in TORCHRUN.items() if key != missing})


def test_a_leftover_that_disagrees_is_refused():
    assert read_launch(OPENMPI | {"WORLD_SIZE": "2"}).world_size == 2
    with pytest.raises(LauncherError, match="WORLD_SIZE=9"):
        read_launch(OPENMPI | {"WORLD_SIZE": "9"})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[03-05,9]", "gpu03"), ("a[2,7]-x,b", "a2-x"), ("", None)],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


def test_a_job_that_is_submitted_inside_of_another_inherits_nothing_of_it(monkeypatch):
    settings = {"SLURM_CONF": "/c", "SLURM_JWT": "j", "HF_HOME": "/h"}
    of_the_job = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "1", "SLURM_CPUS_PER_TASK": "64",
                  "SLURM_CPU_BIND": "mask", "SLURM_EXPORT_ENV": "NONE", "SLURMD_NODENAME": "n1"}  # fmt: skip
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    for name, value in (settings | of_the_job | {"SLURM_JOB_ID": "77", "SQUEUE_PARTITION": "x"}).items():
        monkeypatch.setenv(name, value)
    told = submitting_environment()
    assert settings.items() <= told.items() and "SQUEUE_PARTITION" not in told
    assert not {*of_the_job, "SLURM_JOB_ID"} & told.keys()
    monkeypatch.delenv("SLURM_JOB_ID")
    assert submitting_environment()["SLURM_CPU_BIND"] == "mask", "a setting of its user's, outside of a job"


def test_child_environment_forgets_the_parents_launcher(monkeypatch):
    for key, value in (TORCHRUN | OPENMPI | SLURM | {"TORCHELASTIC_RUN_ID": "x", "PMIX_RANK": "0"}).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("OMPI_MCA_btl", "tcp")
    monkeypatch.setenv("SOMETHING_OF_MINE", "kept")
    environment = child_environment(2)
    assert read_launch(environment).world_size == 1
    assert environment["SLURM_JOB_ID"] == "77"
    assert environment["OMPI_MCA_btl"] == "tcp"
    assert environment["SOMETHING_OF_MINE"] == "kept"
    assert environment["MINIMA_RANKS"] == "2"
    assert environment["PATH"].split(os.pathsep)[0] == os.path.join(sys.prefix, "bin")


@pytest.mark.parametrize("writable", [True, False])
def test_ops_are_built_where_this_user_may_write(monkeypatch, tmp_path, writable):
    monkeypatch.setattr(launcher.os, "environ", {"PATH": os.environ["PATH"]})
    monkeypatch.setattr(launcher.sys, "prefix", str(tmp_path))
    monkeypatch.setattr(launcher.os, "access", lambda path, mode: writable)
    expected = str(tmp_path / "torch_extensions") if writable else None
    assert child_environment(2).get("TORCH_EXTENSIONS_DIR") == expected
    launcher.export_launch(launcher.Launch(0, 1, 0, 1, "127.0.0.1", 1))
    assert os.environ.get("TORCH_EXTENSIONS_DIR") == expected


def test_child_environment_without_a_gpu_shares_the_cores(monkeypatch):
    monkeypatch.setattr(launcher, "num_accelerators", lambda: 0)
    monkeypatch.setattr(launcher, "num_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environment = child_environment(3)
    assert (environment["DS_ACCELERATOR"], environment["OMP_NUM_THREADS"]) == ("cpu", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert child_environment(3)["OMP_NUM_THREADS"] == "5"


def test_child_environment_with_gpus_shares_the_cores_of_an_optimiser_on_the_host(monkeypatch):
    monkeypatch.setattr(launcher, "num_accelerators", lambda: 8)
    monkeypatch.setattr(launcher, "num_cores", lambda: 96)
    for name in ("OMP_NUM_THREADS", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    environment = child_environment(8)
    assert environment["OMP_NUM_THREADS"] == "12" and "DS_ACCELERATOR" not in environment
    assert "OMP_NUM_THREADS" not in child_environment(1)


@pytest.mark.parametrize(("named", "home"), [(True, True), (False, True), (True, False), (False, False)])
def test_kernels_are_kept_in_a_folder_of_a_user_without_a_name_or_a_home(monkeypatch, tmp_path, named, home):
    def getuser() -> str:
        if named:
            return "somebody"
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(launcher.getpass, "getuser", getuser)
    monkeypatch.setattr(launcher.os.path, "expanduser", lambda path: "/home/somebody" if home else path)
    environment = {}
    launcher._keep_caches_apart(environment)
    assert ("TORCHINDUCTOR_CACHE_DIR" in environment) == (not named)
    assert ("TRITON_CACHE_DIR" in environment) == (not home)
    assert all(os.path.isabs(folder) and str(os.getuid()) in folder for folder in environment.values())
    kept = dict.fromkeys(environment, "mine")
    launcher._keep_caches_apart(kept)
    assert set(kept.values()) <= {"mine"}, "what the user has set stays"


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 4), ("", 0), ("0,2", 2), ("1,-1,2", 1), ("0,4,1", 1), ("7", 0), ("MIG-1", 1)]
)
def test_gpus_are_counted_without_torch(monkeypatch, tmp_path, visible, count):
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr(launcher, "Path", lambda path: tmp_path)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert launcher.num_accelerators() == count
    assert launcher.default_ranks() == (count or 2)


def test_exported_launch_reads_back():
    code = (
        "from minima.launcher import *; launch = Launch(1, 2, 1, 2, 'h', 9); export_launch(launch);"
        "assert read_launch() == launch"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_rank_finds_this_environment_s_programs_first_as_the_driver_s_children_do():
    # Else two versions of ninja, each of which builds DeepSpeed's ops anew after the other.
    code = (
        "import os; from minima.launcher import *; launch = Launch(0, 1, 0, 1, 'h', 9); export_launch(launch);"
        "export_launch(launch); print(os.environ['PATH'], child_environment(1)['PATH'], sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], env={"PATH": "/usr/bin"}, capture_output=True, text=True)
    own = f"{Path(sys.prefix) / 'bin'}:/usr/bin"
    assert done.stdout.split() == [own, own], done.stderr


@pytest.mark.parametrize(
    ("visible", "ranks", "told"),
    [
        (None, "2", ["--num_gpus", "2"]),
        ("4,5,6", "2", ["--include", "localhost:4,5"]),
        ("0, 1", "2", ["--include", "localhost:0,1"]),
        ("3,-1,2", "1", ["--include", "localhost:3"]),
        ("NoDevFiles", "2", ["--num_gpus", "2"]),
        ("4,5", "3", None),
        ("GPU-1a2b", "1", None),
    ],
)
def test_deepspeed_gets_the_gpus_that_are_visible(tmp_path, root, visible, ranks, told):
    (tmp_path / "deepspeed").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "deepspeed").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{Path(sys.prefix) / 'bin'}:{os.defpath}", "MINIMA_RANKS": ranks}
    environment |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    command = ["bash", str(root / "launch/deepspeed.sh"), "recipe.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    if told is None:
        assert done.returncode == 2 and "CUDA_VISIBLE_DEVICES" in done.stderr
    else:
        assert done.stdout.splitlines()[1:3] == told, done.stderr


@pytest.mark.parametrize("wrong", [{"RANK": "0"}, {"LOCAL_RANK": "0"}, {"RANK": "1", "LOCAL_RANK": "7"}])
def test_each_leftover_that_disagrees_is_refused(wrong):
    """Two of the three are no launcher's set: the rank is mpirun's, and every process would write its own."""
    assert read_launch(OPENMPI | {"RANK": "1"}).rank == 1
    with pytest.raises(LauncherError, match="but the launcher says 1"):
        read_launch(OPENMPI | wrong)

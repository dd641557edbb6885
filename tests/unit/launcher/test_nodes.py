"""Machines: node lists, tasks of a node, jobs, and rank 0's address told through mpi4py."""

import sys
import types

import pytest

from minima import launcher, nodes
from minima.errors import LauncherError
from minima.launcher import Launch, read_launch, slurm_job, step_master
from minima.nodes import host_names

STEP = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_NODES": "2"}
ONE_EACH = STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", []),
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("gpu[08-10,2]-ib,cpu1", ["gpu08-ib", "gpu09-ib", "gpu10-ib", "gpu2-ib", "cpu1"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
    ],
)
def test_node_lists(text, hosts):
    assert host_names(text) == hosts


def test_one_task_on_each_of_two_nodes():
    first = read_launch(ONE_EACH | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"})
    second = read_launch(ONE_EACH | {"SLURM_PROCID": "1", "SLURM_NODEID": "1"})
    assert (first.master_address, first.master_port) == (second.master_address, second.master_port) == step_master(STEP)
    assert first.master_address == "n1"
    assert [(launch.rank, launch.local_rank, launch.local_world_size) for launch in (first, second)] == [
        (0, 0, 1),
        (1, 0, 1),
    ]


def test_a_node_whose_tasks_nobody_counts_is_refused():
    told = {name: value for name, value in ONE_EACH.items() if name != "SLURM_STEP_TASKS_PER_NODE"}
    with pytest.raises(LauncherError, match="SLURM_STEP_TASKS_PER_NODE=missing"):
        read_launch(told | {"SLURM_PROCID": "1", "SLURM_NODEID": "1"})
    with pytest.raises(LauncherError, match=r"SLURM_STEP_TASKS_PER_NODE=1\(x4\)"):  # of the job, not of the step
        read_launch(ONE_EACH | {"SLURM_PROCID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"})
    one_node = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7"}
    assert read_launch(one_node).local_world_size == 2


def test_a_job_with_tasks_is_no_step_with_tasks():
    batch = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_NPROCS": "8", "SLURM_TASKS_PER_NODE": "4(x2)"}
    launch = read_launch(batch | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"})
    assert (launch.rank, launch.world_size) == (0, 1)


def test_slurm_job():
    assert slurm_job({}) is None
    job = slurm_job({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_RESTART_COUNT": "3"})
    assert (job.job_id, job.restarts, job.nodes, job.step) == ("7", 3, ("n1", "n2"), None)
    array = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_STEP_ID": "0"}
    assert (slurm_job(array).job_id, slurm_job(array).restarts, slurm_job(array).step) == ("7_2", 0, "0")


def test_a_node_has_slurms_name_inside_a_job(monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    assert launcher.node_name() == "n2"
    monkeypatch.delenv("SLURMD_NODENAME")
    monkeypatch.setattr(launcher.socket, "gethostname", lambda: "vm")
    assert launcher.node_name() == "vm"


# -- mpirun over several machines -----------------------------------------------------------------------------------


def rank(number, **more):
    place = {"RANK": number, "SIZE": 2, "LOCAL_RANK": 0, "LOCAL_SIZE": 1}
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in place.items()} | more


@pytest.fixture
def mpi(monkeypatch):
    """Stands for mpi4py; `said` keeps what rank 0 broadcast for the ranks that come after it."""
    state = types.SimpleNamespace(said=None, size=2, finalized=0)

    class World:
        def bcast(self, value, root):
            assert root == 0 and state.finalized == 0
            state.said = state.said or value
            return state.said

        def Get_size(self):
            return state.size

    def finalize():
        state.finalized += 1

    module = types.ModuleType("mpi4py")
    module.MPI = types.SimpleNamespace(COMM_WORLD=World(), Finalize=finalize)
    monkeypatch.setitem(sys.modules, "mpi4py", module)
    monkeypatch.setattr(nodes, "_master", None)
    monkeypatch.setattr(launcher.socket, "gethostname", lambda: "first-host")
    return state


def another_process(monkeypatch, mpi):
    monkeypatch.setattr(nodes, "_master", None)
    mpi.finalized = 0


def test_rank_0_tells_where_it_is(mpi, monkeypatch):
    first = read_launch(rank(0))
    assert first == Launch(0, 2, 0, 1, "first-host", first.master_port) and first.master_port > 0
    assert mpi.finalized == 1, "a rank that ends without ending MPI counts as failed"
    assert read_launch(rank(0)) == first, "MPI cannot be begun a second time"
    another_process(monkeypatch, mpi)
    monkeypatch.setattr(launcher.socket, "gethostname", lambda: "second-host")
    second = read_launch(rank(1))
    assert (second.master_address, second.master_port) == ("first-host", first.master_port)


def test_a_given_address_is_taken(mpi):
    assert read_launch(rank(0, MASTER_ADDR="first-ib")).master_address == "first-ib"


def test_mpi4py_is_not_asked_where_it_is_known(mpi):
    assert read_launch(rank(1, MASTER_ADDR="a", MASTER_PORT="5")) == Launch(1, 2, 0, 1, "a", 5)
    assert mpi.said is None


def test_without_mpi4py(mpi, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(LauncherError, match=r"(?s)mpi4py cannot be loaded.*pip install mpi4py.*MASTER_ADDR"):
        read_launch(rank(0))


def test_an_mpi4py_of_another_mpi_is_refused(mpi):
    mpi.size = 1
    with pytest.raises(LauncherError, match="started 2 ranks, but mpi4py sees 1"):
        read_launch(rank(1))


def test_a_step_on_two_nodes_is_one_whatever_is_missing():
    told = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "n[1-2]",
    }  # fmt: skip
    with pytest.raises(LauncherError, match="SLURM_STEP_TASKS_PER_NODE=missing"):
        read_launch(told)
    with pytest.raises(LauncherError, match="SLURM_PROCID=3, SLURM_LOCALID=1"):
        read_launch({name: value for name, value in told.items() if name != "SLURM_STEP_NODELIST"})
    launch = read_launch(told | {"SLURM_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1"})
    assert (launch.rank, launch.local_world_size, launch.master_address) == (3, 2, "n1")


def test_open_mpi_on_one_machine_needs_no_more_than_its_own_variables():
    told = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    ranks = [
        read_launch(told | {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    assert ranks[0].master_address == "127.0.0.1" and ranks[0].master_port == ranks[1].master_port > 1024

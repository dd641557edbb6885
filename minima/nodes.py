"""Interprets Slurm's and Open MPI's variables. It never reads the environment itself: `launcher.py` passes it in."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from minima.errors import LauncherError

_PORTS = (20_000, 30_000)  # below Linux's ephemeral range, which starts at 32,768, so no client socket uses them
# Variables that launchers set for their ranks. A child that inherited one would believe it is a rank of its parent's
# launcher. The allocation (SLURM_JOB_ID, SLURM_JOB_NODELIST) and settings (OMPI_MCA_btl) are kept.
_FOREIGN = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_SIZE|LOCAL_WORLD_SIZE|CROSS_RANK|CROSS_SIZE|NODE_RANK|MASTER_ADDR|MASTER_PORT"
    r"|(GROUP|ROLE)_(RANK|WORLD_SIZE|NAME)|TORCHELASTIC_.*|OMPI_COMM_WORLD_.*|OMPI_UNIVERSE_SIZE"
    r"|OMPI_MCA_(ess|orte|pmix|prte)_.*|PMI_.*|PMIX_.*|MPI_LOCAL.*|MV2_COMM_.*"
    r"|SLURM_(PROCID|LOCALID|NODEID|GTIDS|TASK_PID|STEPID|STEP_.*|SRUN_.*)|ACCELERATE_.*"
    r"|MINIMA_(RANKS|DRIVER|TERMINAL)"
)
# Slurm's commands take default options from these, and would then list other jobs or signal other processes.
_OF_A_COMMAND = re.compile(r"(SQUEUE|SCANCEL|SACCT|SINFO)_.*")
_OF_THE_CLUSTER = re.compile(r"SLURM_(CONF|CONF_SERVER|CLUSTERS|JWT|SACK_.*)")  # settings of the cluster, not of a job

_master: tuple[str, int] | None = None  # what the ranks of an mpirun have agreed on


@dataclass(frozen=True)
class SlurmJob:
    """A Slurm job."""

    job_id: str  # as `squeue` shows it; for a task of an array with the task's number: `77_3`
    restarts: int  # how often it was requeued
    nodes: tuple[str, ...]  # host names of the allocation, in Slurm's order
    nodelist: str  # the same in Slurm's notation: `gpu[03-05]`
    step: str | None  # the `srun` step; None in the batch script itself


def job_of(environment: Mapping[str, str]) -> SlurmJob | None:
    """The job that these variables describe; None outside a job."""
    job = environment.get("SLURM_JOB_ID", "")
    if not job:
        return None
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    nodelist = environment.get("SLURM_JOB_NODELIST", "")
    return SlurmJob(
        job_id=f"{array}_{task}" if array and task else job,
        restarts=number(environment, "SLURM_RESTART_COUNT", 0),
        nodes=tuple(host_names(nodelist)),
        nodelist=nodelist,
        step=environment.get("SLURM_STEP_ID"),
    )


def master_of_step(environment: Mapping[str, str]) -> tuple[str | None, int]:
    """Host and port of rank 0 of an `srun` step: the same on all its ranks, different from other steps'."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    job = f"{environment.get('SLURM_JOB_ID', '')}.{environment.get('SLURM_STEP_ID', '')}"
    return first_host(nodes), derived_port(job)


def step_local_size(environment: Mapping[str, str], world_size: int) -> int:
    """The number of an `srun` step's tasks on this node.

    Raises:
        LauncherError: the step spans several nodes, and no variable says how many tasks this one has.
    """
    counts: list[int] = []  # "4(x2),3" is four tasks on each of the first two nodes and three on the third
    told = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or ""
    for part in told.split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [int(match[1])] * int(match[2] or 1)
    node = number(environment, "SLURM_NODEID", 0)
    if 0 <= node < len(counts) and sum(counts) == world_size:
        return counts[node]
    nodes = number(environment, "SLURM_STEP_NUM_NODES", len(host_names(environment.get("SLURM_STEP_NODELIST", ""))))
    alone = environment.get("SLURM_PROCID") == environment.get("SLURM_LOCALID")  # true on a single or the first node
    if max(nodes, node + 1) == 1 and alone:
        return world_size
    names = ("PROCID", "LOCALID", "STEP_NUM_TASKS", "STEP_NUM_NODES", "NODEID", "STEP_TASKS_PER_NODE")
    shown = ", ".join(f"SLURM_{name}={environment.get(f'SLURM_{name}', 'missing')}" for name in names)
    raise LauncherError(
        f"impossible launcher variables: {shown}",
        "with several nodes, a rank must know how many ranks run on its own node, since they share its GPUs",
        "start the ranks with srun, and pass on all its variables (--export=ALL)",
    )


def host_names(nodes: str) -> list[str]:
    """The hosts of a Slurm node list: `gpu[03-05,9]-a,cpu1` is `gpu03-a`, `gpu04-a`, `gpu05-a`, `gpu9-a`, `cpu1`."""
    found: list[str] = []
    for entry in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        names = [""]
        for plain, bracket in re.findall(r"([^\[]+)|\[([^\]]*)\]", entry):
            ends = [plain] if plain else [end for part in bracket.split(",") for end in _numbers(part)]
            names = [name + end for name in names for end in ends]
        found += [name.strip() for name in names if name.strip()]
    return found


def _numbers(text: str) -> list[str]:
    """Expand a range: `03-05` becomes `03`, `04`, `05`."""
    first, dash, last = text.partition("-")
    if not dash or not (first.isdigit() and last.isdigit()):
        return [text]
    return [str(value).zfill(len(first)) for value in range(int(first), int(last) + 1)]


def first_host(nodes: str) -> str | None:
    """The first host of a Slurm node list; None if it is empty."""
    return next(iter(host_names(nodes)), None)


def derived_port(job: str) -> int:
    """A port derived from the job's id: every rank computes the same one, and other jobs rarely collide with it."""
    first, last = _PORTS
    return first + sum(ord(letter) * 31**index for index, letter in enumerate(job)) % (last - first)


def broadcast_master(own_host: str, address: str | None, own_port: int, world_size: int) -> tuple[str, int]:
    """Broadcast rank 0's host and port to all ranks of an `mpirun` over several machines. Every rank calls it.

    MPI is initialised and finalised here: a rank that exited without finalising MPI would count as failed.

    Args:
        own_host: this machine's name.
        address: what rank 0 announces instead of its machine's name.
        own_port: a free port on this machine.
        world_size: the number of ranks according to mpirun.

    Raises:
        LauncherError: mpi4py is not installed, or was built for another MPI than this mpirun's.
    """
    global _master
    if _master is not None:
        return _master
    do = "export MASTER_ADDR (host of rank 0) and MASTER_PORT (a free port there) for every rank: mpirun -x NAME"
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # a RuntimeError if there is no MPI library to load
        raise LauncherError(
            f"{world_size} ranks of mpirun on several machines without MASTER_ADDR and MASTER_PORT, and mpi4py cannot "
            f"be loaded ({error})",
            "the ranks find each other through rank 0's address, which mpi4py would send them",
            f"pip install mpi4py, or {do}",
        ) from error
    found: tuple[str, int] = MPI.COMM_WORLD.bcast((address or own_host, own_port), root=0)
    size = MPI.COMM_WORLD.Get_size()
    MPI.Finalize()  # once only: MPI cannot be initialised a second time
    if size != world_size:
        raise LauncherError(
            f"mpirun started {world_size} ranks, but mpi4py sees {size}",
            "mpi4py was built for another MPI than this mpirun's, so its ranks cannot find each other",
            f"rebuild it with this MPI's mpicc (pip install --no-binary mpi4py mpi4py), or {do}",
        )
    _master = found
    return found


def number(environment: Mapping[str, str], name: str, default: int) -> int:
    """A variable's value as an integer; `default` if it is unset or empty.

    Raises:
        LauncherError: the value is not an integer.
    """
    text = environment.get(name, "").strip()
    if not text:
        return default
    if re.fullmatch(r"[+-]?[0-9]+", text):
        return int(text)
    raise LauncherError(
        f"{name}={text!r} is not a whole number",
        "ranks and group sizes are whole numbers",
        f"unset {name}, or start the ranks through one of the launchers",
    )


def is_set(environment: Mapping[str, str], name: str) -> bool:
    """Whether a variable is set and not blank."""
    return bool(environment.get(name, "").strip())


def missing_variables(names: tuple[str, ...], environment: Mapping[str, str]) -> LauncherError:
    """The error to raise when only some variables of a set are given."""
    given = [name for name in names if is_set(environment, name)]
    missing = [name for name in names if name not in given]
    empty = [name for name in missing if name in environment]
    return LauncherError(
        f"{' and '.join(f'{name}={environment[name]}' for name in given) or 'no variable'} without "
        f"{' and '.join(missing)}" + (f" ({', '.join(empty)} being empty)" if empty else ""),
        "a rank must know its rank, the world size and its rank on its machine; a guess could hang the group",
        f"set {', '.join(missing)} too, or unset {', '.join([*given, *empty])}",
    )


def free_port() -> int:
    """A port on this machine that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def openmpi_master(environment: Mapping[str, str], one_machine: bool) -> tuple[str | None, int]:
    """Host and port of rank 0 among Open MPI's ranks.

    If no variable identifies the job, the process id of the mpirun that started the ranks does.
    """
    if not one_machine:
        world_size = number(environment, "OMPI_COMM_WORLD_SIZE", 1)
        return broadcast_master(socket.gethostname(), environment.get("MASTER_ADDR"), free_port(), world_size)
    names = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_hnp_uri")
    own = f"{os.getuid()}.{os.getppid()}"  # of the mpirun that started all ranks here
    job = next((environment[name] for name in names if is_set(environment, name)), own)
    return "127.0.0.1", derived_port(job)


def slurm_master(environment: Mapping[str, str], one_machine: bool) -> tuple[str | None, int]:
    """Host and port of rank 0 in an `srun` step."""
    host, port = master_of_step(environment)
    return "127.0.0.1" if one_machine else host, port


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables that launchers set for their ranks."""
    return {name: value for name, value in environment.items() if not _FOREIGN.fullmatch(name)}


def without_job(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for Slurm's commands and the jobs they submit: without defaults of their options.

    Inside a job, that job's own variables are left out too: a new job that inherited its cores, its place in an array
    or its task binding would request the same, and send its signals to the wrong job.
    """
    own = is_set(environment, "SLURM_JOB_ID")
    return {
        name: value
        for name, value in environment.items()
        if not _OF_A_COMMAND.fullmatch(name)
        and not (own and re.match(r"SLURMD?_", name) and not _OF_THE_CLUSTER.fullmatch(name))
    }

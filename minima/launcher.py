"""Rank, world size and master address from the launcher's variables. The only file that reads the environment."""

import getpass
import os
import re
import socket
import sys
import uuid
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from minima.disk import own_temporary_folder
from minima.errors import LauncherError
from minima.nodes import (
    SlurmJob,
    free_port,
    is_set,
    job_of,
    master_of_step,
    missing_variables,
    number,
    openmpi_master,
    slurm_master,
    step_local_size,
    without_job,
    without_launcher,
)

DRIVER = "MINIMA_DRIVER"  # set for everything `minima run` starts; unique to each start
_GENERIC = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_OPENMPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


@dataclass(frozen=True)
class Launch:
    """One rank's place in its process group."""

    rank: int = 0  # of this process, across all machines
    world_size: int = 1  # processes on all machines
    local_rank: int = 0  # of this process on its machine; selects the GPU
    local_world_size: int = 1  # processes on this machine
    master_address: str = "127.0.0.1"  # host of rank 0
    master_port: int = 0  # the port that rank 0 listens on


def read_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """This process's place in its group, from the launcher's variables.

    `RANK`, `WORLD_SIZE` and `LOCAL_RANK` together take precedence, then Open MPI's variables, then Slurm's inside an
    `srun` step with more than one task; so torchrun under srun counts as torchrun. Without any, it is a single process.

    Args:
        environment: used instead of the process's own.

    Raises:
        LauncherError: a set of variables is partial, not a number, or impossible.
    """
    environment = os.environ if environment is None else environment
    generic = [name for name in _GENERIC if is_set(environment, name)]
    if len(generic) == len(_GENERIC):
        local_size = "LOCAL_WORLD_SIZE" if is_set(environment, "LOCAL_WORLD_SIZE") else "LOCAL_SIZE"
        return _launch(environment, _GENERIC, local_size, None)
    if any(is_set(environment, name) for name in _OPENMPI):
        launch = _launch(environment, _OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE", openmpi_master)
    elif number(environment, "SLURM_STEP_NUM_TASKS", 1) != 1:
        launch = _launch(environment, _SLURM, None, slurm_master)
    elif generic:
        raise missing_variables(_GENERIC, environment)
    else:
        return Launch(master_port=free_port())
    for name, value in (("RANK", launch.rank), ("WORLD_SIZE", launch.world_size), ("LOCAL_RANK", launch.local_rank)):
        if number(environment, name, value) != value:
            raise LauncherError(
                f"{name}={environment[name]}, but the launcher says {value}",
                "ranks that disagree about their group wait for each other for ever",
                f"unset {name}, or set all of {', '.join(_GENERIC)}",
            )
    return launch


def _launch(environment, names, local_size_name, master) -> Launch:
    if not all(is_set(environment, name) for name in names):
        raise missing_variables(names, environment)
    rank, world_size, local_rank = (number(environment, name, 0) for name in names)
    if local_size_name is None:
        local_size = step_local_size(environment, world_size)
    else:
        local_size = number(environment, local_size_name, world_size)
    if not 0 <= rank < world_size or not 0 <= local_rank < local_size <= world_size or local_rank > rank:
        shown = ", ".join(f"{name}={environment[name]}" for name in (*names, local_size_name) if name in environment)
        raise LauncherError(
            f"impossible launcher variables: {shown}",
            "a rank is at least 0 and less than the number of ranks, both on its machine and across all machines",
            "start the ranks through one of the launchers, or unset these variables to run one process",
        )
    address, port = environment.get("MASTER_ADDR"), number(environment, "MASTER_PORT", 0)
    if (not address or not port) and world_size > 1:
        found = master(environment, local_size == world_size) if master else (None, 0)
        address, port = address or found[0], port or found[1]
    if (world_size > 1 and not (address and port)) or not 0 <= port < 65536:
        raise LauncherError(
            f"{world_size} rank{'s' * (world_size > 1)} with MASTER_ADDR={address or 'missing'} and "
            f"MASTER_PORT={port or 'missing'}",
            "the ranks find each other through rank 0's address",
            "export MASTER_ADDR (host of rank 0) and MASTER_PORT (a free port there) for every rank",
        )
    return Launch(rank, world_size, local_rank, local_size, address or "127.0.0.1", port or free_port())


def step_master(environment: Mapping[str, str] | None = None) -> tuple[str | None, int]:
    """Host and port of rank 0 in an `srun` step: its first node, and a port derived from the job and the step."""
    return master_of_step(os.environ if environment is None else environment)


def slurm_job(environment: Mapping[str, str] | None = None) -> SlurmJob | None:
    """The Slurm job that this process belongs to, or None outside a job.

    Args:
        environment: used instead of the process's own.
    """
    return job_of(os.environ if environment is None else environment)


def node_name() -> str:
    """This machine's name: Slurm's node name inside a job, otherwise its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def without_gpus() -> bool:
    """Whether `DS_ACCELERATOR=cpu` is set: any GPUs are then left unused."""
    return os.environ.get("DS_ACCELERATOR") == "cpu"


def num_accelerators() -> int:
    """The number of GPUs that this process may use, found without torch; 0 if `DS_ACCELERATOR=cpu` is set."""
    devices = [path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    if not devices or without_gpus():
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(devices)
    named = [part.strip() for part in visible.split(",")]
    for index, part in enumerate(named):  # CUDA ignores everything from the first invalid entry on
        if not part or part.startswith("-") or (part.isdecimal() and int(part) >= len(devices)):
            return index
    return len(named)


def default_ranks(at_most: int | None = None) -> int:
    """The default number of ranks: one for each GPU, or two without a GPU, so that sharding is really exercised.

    Args:
        at_most: an upper bound.
    """
    ranks = num_accelerators() or 2
    return ranks if at_most is None else min(ranks, at_most)


def has_host_file() -> bool:
    """Whether MINIMA_HOSTFILE says which machines, and how many ranks on each."""
    return bool(os.environ.get("MINIMA_HOSTFILE"))


def cleaned_environment() -> dict[str, str]:
    """This process's environment without launchers' variables, for a program with a launcher of its own."""
    # UTF-8, because PyTorch reads its own source files in the locale's encoding, and GB18030 cannot decode them.
    defaults = {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
    environment = defaults | without_launcher(os.environ)
    environment.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # torch and transformers warn about each other
    environment["PATH"] = _own_programs_first(environment)
    with suppress(FileNotFoundError):  # the working directory is gone
        if not {"", os.getcwd()} & set(sys.path):  # a `yaml.py` in a folder of somebody's model is not for `python -m`
            environment.setdefault("PYTHONSAFEPATH", "1")
    return environment


def submitting_environment() -> dict[str, str]:
    """The environment for Slurm's commands, inherited by the jobs that they submit: see `nodes.without_job`."""
    told = without_job(cleaned_environment())
    # a job may run in a container that has its minima in the working directory
    return {name: value for name, value in told.items() if name != "PYTHONSAFEPATH" or name in os.environ}


def _own_programs_first(environment: Mapping[str, str]) -> str:
    """PATH with this Python's programs first: with two versions of ninja, each would rebuild the other's ops."""
    own, path = str(Path(sys.prefix) / "bin"), environment.get("PATH", os.defpath)
    return path if path.split(os.pathsep)[0] == own else os.pathsep.join([own, path])


def child_environment(ranks: int, *, by_host_file: bool = False, terminal_columns: int = 0) -> dict[str, str]:
    """The environment for a launcher that `minima run` starts.

    Args:
        ranks: processes that the launcher starts on this machine, or on each machine.
        by_host_file: let MINIMA_HOSTFILE, if set, determine the ranks instead; nothing is known about its machines.
        terminal_columns: width of the terminal that finally shows the output; 0 if it is not a terminal.
    """
    environment = cleaned_environment() | {DRIVER: uuid.uuid4().hex}
    if terminal_columns:
        environment["MINIMA_TERMINAL"] = str(terminal_columns)
    elsewhere = by_host_file and environment.get("MINIMA_HOSTFILE")
    if not elsewhere:
        environment["MINIMA_RANKS"] = str(ranks)
        # With GPUs too, for an optimiser in host memory: torchrun would set 1, deepspeed nothing. A single process on a
        # GPU machine keeps PyTorch's default, and lm-eval may start other processes.
        if ranks > 1 or not num_accelerators():
            environment.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // ranks)))
        if not num_accelerators():
            environment.setdefault("DS_ACCELERATOR", "cpu")
    _keep_extensions_apart(environment)
    return environment


def _keep_extensions_apart(environment: MutableMapping[str, str]) -> None:
    """Build ops inside this Python environment, so that a killed build from another one leaves no lock here.

    In a shared environment that this user may not write to, PyTorch's default folder in the user's home is used.
    """
    folder = Path(sys.prefix) / "torch_extensions"
    if sys.prefix != sys.base_prefix and os.access(folder if folder.exists() else folder.parent, os.W_OK):
        environment.setdefault("TORCH_EXTENSIONS_DIR", str(folder))


def processes_of(session: int, driver: str | None) -> list[psutil.Process]:
    """All processes of a launcher on this machine, itself included.

    Args:
        session: the id of the session that it was started in.
        driver: the launcher's MINIMA_DRIVER, which identifies processes in other sessions, such as torchrun's ranks.
    """
    found = []
    for process in psutil.process_iter(["name"]):
        try:
            if os.getsid(process.pid) == session or (driver and process.environ().get(DRIVER) == driver):
                found.append(process)
        except (psutil.Error, ProcessLookupError):
            continue
    return found


def is_rank(process: psutil.Process) -> bool:
    """Whether the process is a launcher's rank that runs `minima stage`, and not the launcher itself."""
    try:
        runs_stage = {"minima", "stage"} <= set(process.cmdline())
        return runs_stage and not {"RANK", "OMPI_COMM_WORLD_RANK"}.isdisjoint(process.environ())
    except psutil.Error:
        return False


def num_cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def started_by_driver() -> bool:
    """Whether `minima run` started this process, and so holds the run folder's lock on its behalf."""
    return DRIVER in os.environ


def terminal_columns() -> int:
    """Width of the terminal behind the driver's pipe; 0 if there is none."""
    text = os.environ.get("MINIMA_TERMINAL", "")
    return int(text) if text.isdigit() else 0


def export_launch(launch: Launch) -> None:
    """Export the rank's place to the environment, the only place where DeepSpeed and torch look for it."""
    os.environ |= {
        "RANK": str(launch.rank),
        "WORLD_SIZE": str(launch.world_size),
        "LOCAL_RANK": str(launch.local_rank),
        "LOCAL_WORLD_SIZE": str(launch.local_world_size),
        # Without it, DeepSpeed on CPUs starts `numactl` for every bucket of gradients, to count the ranks of a machine.
        "LOCAL_SIZE": str(launch.local_world_size),
        "MASTER_ADDR": launch.master_address,
        "MASTER_PORT": str(launch.master_port),
    }
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
    if sys.prefix != sys.base_prefix:
        os.environ["PATH"] = _own_programs_first(os.environ)
    _keep_extensions_apart(os.environ)
    _keep_caches_apart(os.environ)


def _keep_caches_apart(environment: MutableMapping[str, str]) -> None:
    """Set folders for compiled kernels if this user has no name or no home: PyTorch up to 2.12 asks for the name, and
    Triton would create a folder called `~` in the working directory. Kernels are code: nobody else may add any."""
    name = f"minima-kernels-{os.getuid()}"  # earlier versions let a group write into minima-UID
    try:
        getpass.getuser()
    except (KeyError, OSError):
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{own_temporary_folder(name)}/torchinductor")
    if not os.path.isabs(os.path.expanduser("~")):
        environment.setdefault("TRITON_CACHE_DIR", f"{own_temporary_folder(name)}/triton")

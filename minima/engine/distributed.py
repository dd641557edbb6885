"""The process group, and the few collectives that the rest of the engine needs."""

import dataclasses
import datetime
import os
import resource
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups as deepspeed_groups
from torch import Tensor

from minima.errors import LauncherError, MinimaError
from minima.launcher import Launch, export_launch, num_accelerators

# Rank 0 may write a long export while the others wait in a collective; DeepSpeed's own limit is 10 minutes.
TIMEOUT = datetime.timedelta(hours=2)
OPEN_FILES = 1 << 16  # as many as a rank may want: connections to every other rank, for each of several groups
R = TypeVar("R")
_without_others = False
_joined: Launch | None = None
_nodes: list[list[int]] | None = None
_node_group: dist.ProcessGroup | None = None


def start(launch: Launch, timeout: datetime.timedelta = TIMEOUT) -> None:
    """Join the process group that the launcher described; a second call does nothing.

    Args:
        launch: this rank's place.
        timeout: of joining, and of each collective.

    Raises:
        LauncherError: GPUs are here, or are asked for, and PyTorch can use none.
    """
    global _joined
    if dist.is_initialized():
        return
    # Two thousand lines a run about names that DeepSpeed, not we, will have to change.
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
    # On GPUs a barrier says that it takes the current device. It shall: that was set for this rank below.
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
    _joined = launch
    _raise_file_limit()
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    _check_usable(0 if on_cpu else accelerator.device_count(), num_accelerators() or int(not on_cpu))
    # Under `srun --gpus-per-task=1` each rank sees one GPU, whatever its number on the machine.
    index = launch.local_rank if on_cpu else launch.local_rank % accelerator.device_count()
    export_launch(dataclasses.replace(launch, local_rank=index))  # DeepSpeed reads rank and address from there only
    if on_cpu:
        _without_shared_memory()
    else:
        accelerator.set_device(index)
    deepspeed.init_distributed(
        dist_backend="gloo" if on_cpu else accelerator.communication_backend_name(),
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timeout,
        rank=launch.rank,
        world_size=launch.world_size,
    )
    # DeepSpeed would make this group of all ranks itself, with the backend's own limit (NCCL: 10 minutes), and wait in
    # it for the last rank that still reads its whole copy of a teacher.
    deepspeed_groups._WORLD_GROUP = dist.new_group(timeout=timeout)


def _raise_file_limit() -> None:
    """Ask for as many open files as the system lets this process have: mostly 1,024, and many more on asking."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # some systems have a limit beyond the one that they tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _check_usable(usable: int, here: int) -> None:
    """Refuse GPUs that PyTorch cannot use: DeepSpeed would take the processor with a line of its log."""
    if here and not usable:
        raise LauncherError(
            f"{here} GPU{'s' if here > 1 else ''} on this machine, and PyTorch {torch.__version__} can use none",
            "the run would go on on the processor, many times slower, or not at all",
            "see what `minima doctor` says: mostly the driver is older than PyTorch's CUDA, or PyTorch is built for "
            "the processor alone. To run on the processor, set DS_ACCELERATOR=cpu",
        )


def _without_shared_memory() -> None:
    """Keep DeepSpeed from starting its op for sums through shared memory; gloo carries everything.

    It serves `inference_all_reduce` alone, which nothing here calls, and it would cost each rank 66 MiB in /dev/shm,
    which DeepSpeed never removes, and the first start the time to compile it.
    """
    deepspeed.ops.__compatible_ops__[get_accelerator().create_op_builder("ShareMemCommBuilder").NAME] = False


def stop() -> None:
    """Leave the process group."""
    global _nodes, _node_group
    _nodes = _node_group = None
    if dist.is_initialized():
        dist.destroy_process_group()


def leave() -> NoReturn:
    """Leave the process group and end this process, whose work is done.

    It ends at once: what libraries tear down at a process's end has been seen to crash a rank after its work.
    """
    stop()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def open_store(prefix: str, timeout_seconds: float) -> dist.Store:
    """A connection of its own to the process group's key-value store, for a thread beside the collectives.

    Args:
        prefix: of its keys.
        timeout_seconds: that one call may take.
    """
    if _joined is None or _joined.world_size == 1:
        return dist.PrefixStore(prefix, dist.HashStore())
    timeout = datetime.timedelta(seconds=timeout_seconds)
    store = dist.TCPStore(_joined.master_address, _joined.master_port, is_master=False, timeout=timeout)
    return dist.PrefixStore(prefix, store)


@contextmanager
def without_other_ranks() -> Iterator[None]:
    """While rank 0 does what needs no other rank, nothing waits for them, though they are in its process group."""
    global _without_others
    _without_others = True
    try:
        yield
    finally:
        _without_others = False


def _together() -> bool:
    return dist.is_initialized() and not _without_others


def rank() -> int:
    """This process's number in the world."""
    return dist.get_rank()


def world_size() -> int:
    """Processes in the world."""
    return dist.get_world_size()


def is_main() -> bool:
    """Whether this process writes shared files: rank 0, or the only process."""
    return share()[0] == 0


def device() -> torch.device:
    """Where this rank computes."""
    return torch.device(get_accelerator().current_device_name())


def node_ranks() -> list[list[int]]:
    """The ranks of each node, in order; every rank calls it once."""
    global _nodes
    if _nodes is None:
        by_host: dict[str, list[tuple[int, int]]] = {}
        mine = (socket.gethostname(), world_size() if _joined is None else _joined.local_world_size)
        for number, (host, size) in enumerate(gather_objects(mine)):
            by_host.setdefault(host, []).append((number, size))
        _nodes = []
        for members in by_host.values():  # a host may stand for several nodes, as in tests; each has `size` ranks
            ranks, size = [number for number, _ in members], members[0][1]
            _nodes += [ranks[start : start + size] for start in range(0, len(ranks), size)]
    return _nodes


def node_group() -> dist.ProcessGroup:
    """The process group of this rank's node; every rank calls it."""
    global _node_group
    if _node_group is None:
        groups = [dist.new_group(ranks, timeout=TIMEOUT) for ranks in node_ranks()]
        _node_group = next(group for group, ranks in zip(groups, node_ranks(), strict=True) if rank() in ranks)
    return _node_group


def barrier() -> None:
    """Wait for every rank."""
    if share()[1] > 1:  # DeepSpeed tells NCCL no device of a lone one, and NCCL warns that it guesses
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum of `tensor` over all ranks, in place and returned."""
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def gather_objects(value: Any) -> list[Any]:
    """What each rank gave, on every rank. For small facts of our own, never for data."""
    if not _together():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def raise_together(error: MinimaError | None) -> None:
    """End every rank with the error that one of them met: a rank that raised alone would leave the others waiting.

    Args:
        error: this rank's, or None.
    """
    if not _together():
        if error is not None:
            raise error
        return
    for met in gather_objects(error):
        if met is not None:
            raise met


@contextmanager
def refused_together(cannot: Callable[[OSError], MinimaError] | None = None) -> Iterator[None]:
    """Raise at its end, on every rank, what a rank refused inside. Every rank enters it; no collective runs in it.

    Args:
        cannot: what an OSError is to its user; without it, one ends its rank alone.
    """
    error: MinimaError | None = None
    try:
        yield
    except MinimaError as refusal:
        error = refusal
    except OSError as failure:
        if cannot is None:
            raise
        error = cannot(failure)
    raise_together(error)


def all_reduce_max(value: float) -> float:
    """The largest of the ranks' values."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def share() -> tuple[int, int]:
    """This rank and the number of ranks, for work that is divided; (0, 1) outside of a process group."""
    return (dist.get_rank(), dist.get_world_size()) if _together() else (0, 1)


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank; without a process group this process's own."""
    if not _together():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def on_main(work: Callable[[], R]) -> R:
    """What rank 0 makes, on every rank; what it refuses, all refuse."""
    result: tuple[R | None, MinimaError | None] = (None, None)
    if is_main():
        try:
            result = (work(), None)
        except MinimaError as error:
            result = (None, error)
    value, refusal = broadcast_object(result)
    if refusal is not None:
        raise refusal
    return value

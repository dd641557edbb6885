"""The process group, and the few collectives that the rest of the engine needs."""

import dataclasses
import datetime
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups as deepspeed_groups
from torch import Tensor

from minima.disk import raise_file_limit
from minima.errors import LauncherError, MinimaError
from minima.launcher import Launch, export_launch, num_accelerators

# Rank 0 may write a long export while the others wait in a collective; DeepSpeed's own limit is 10 minutes.
TIMEOUT = datetime.timedelta(hours=2)
R = TypeVar("R")
_without_others = False
_joined: Launch | None = None
_nodes: list[list[int]] | None = None
_node_group: dist.ProcessGroup | None = None


def start(launch: Launch, timeout: datetime.timedelta = TIMEOUT) -> None:
    """Join the process group that the launcher described; a second call does nothing.

    Args:
        launch: this rank's place among the ranks.
        timeout: limit for joining, and for each collective.

    Raises:
        LauncherError: there are GPUs, or a GPU accelerator is requested, but PyTorch can use none.
    """
    global _joined
    if dist.is_initialized():
        return
    # Otherwise two thousand lines a run about deprecated names, which only DeepSpeed can change.
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
    # On GPUs a barrier warns that it uses the current device. That is intended: it is set for this rank below.
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
    _joined = launch
    raise_file_limit()
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    _check_usable(0 if on_cpu else accelerator.device_count(), num_accelerators() or int(not on_cpu))
    # Under `srun --gpus-per-task=1` each rank sees one GPU, whatever its local rank.
    index = launch.local_rank if on_cpu else launch.local_rank % accelerator.device_count()
    export_launch(dataclasses.replace(launch, local_rank=index))  # DeepSpeed reads them only there
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
    # DeepSpeed would create this group of all ranks itself, with the backend's own timeout (NCCL: 10 minutes), in which
    # it waits for the last rank that still reads its whole copy of a teacher.
    deepspeed_groups._WORLD_GROUP = dist.new_group(timeout=timeout)


def _check_usable(usable: int, here: int) -> None:
    """Refuse GPUs that PyTorch cannot use: DeepSpeed would fall back to the CPU with only a log line."""
    if here and not usable:
        raise LauncherError(
            f"{here} GPU{'s' if here > 1 else ''} on this machine, but PyTorch {torch.__version__} can use none",
            "the run would fall back to the CPU, many times slower, or not start at all",
            "run `minima doctor`: usually the driver is too old for PyTorch's CUDA version, or PyTorch is a CPU-only "
            "build. To run on the CPU, set DS_ACCELERATOR=cpu",
        )


def _without_shared_memory() -> None:
    """Keep DeepSpeed from loading its op for all-reduces through shared memory; gloo carries everything.

    Only `inference_all_reduce` uses the op, and nothing here calls that. Where LOCAL_SIZE is the number of ranks, which
    `export_launch` makes it, it would cost each rank 66 MiB in /dev/shm, which DeepSpeed never removes, and the first
    start would have to compile it.
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

    It exits without Python's shutdown: what libraries tear down there has been seen to crash ranks that had finished.
    """
    stop()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def open_store(prefix: str, timeout_seconds: float) -> dist.Store:
    """Open a separate connection to the process group's key-value store, for use by a thread while collectives run.

    Args:
        prefix: put before each of its keys.
        timeout_seconds: limit for one call.
    """
    if _joined is None or _joined.world_size == 1:
        return dist.PrefixStore(prefix, dist.HashStore())
    timeout = datetime.timedelta(seconds=timeout_seconds)
    store = dist.TCPStore(_joined.master_address, _joined.master_port, is_master=False, timeout=timeout)
    return dist.PrefixStore(prefix, store)


@contextmanager
def without_other_ranks() -> Iterator[None]:
    """Make this module's functions act as if this process were the only one, for work that only rank 0 does."""
    global _without_others
    _without_others = True
    try:
        yield
    finally:
        _without_others = False


def _together() -> bool:
    return dist.is_initialized() and not _without_others


def rank() -> int:
    """This process's rank."""
    return dist.get_rank()


def world_size() -> int:
    """The number of ranks."""
    return dist.get_world_size()


def is_main() -> bool:
    """Whether this process writes shared files: rank 0, or the only process."""
    return share()[0] == 0


def device() -> torch.device:
    """The device on which this rank computes."""
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
        for members in by_host.values():  # in tests one host plays several nodes, of `size` ranks each
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
    if share()[1] > 1:  # for a single rank DeepSpeed gives NCCL no device, and NCCL warns that it guesses
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all ranks in place, and return it."""
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def gather_objects(value: Any) -> list[Any]:
    """The `value` of every rank, in order, on every rank. For small facts of our own, never for data."""
    if not _together():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def raise_together(error: MinimaError | None) -> None:
    """Raise one rank's error on every rank: a rank that raised alone would leave the others waiting."""
    for met in gather_objects(error):
        if met is not None:
            raise met


@contextmanager
def refused_together(cannot: Callable[[OSError], MinimaError] | None = None) -> Iterator[None]:
    """At the end of the block, raise on every rank the MinimaError that any rank raised inside it.

    Every rank enters the block, and no collective runs inside it.

    Args:
        cannot: turns an OSError into an error for the user; without it, an OSError ends its own rank alone.
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
    """The maximum of the ranks' values."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def share() -> tuple[int, int]:
    """This rank and the number of ranks, for dividing work; (0, 1) outside a process group."""
    return (dist.get_rank(), dist.get_world_size()) if _together() else (0, 1)


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every rank; outside a process group, `value` itself."""
    if not _together():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def on_main(work: Callable[[], R]) -> R:
    """Run `work` on rank 0 and return its result on every rank; a MinimaError from it is raised on every rank."""
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

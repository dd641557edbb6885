"""The process group, and the few collectives that the rest of the engine needs."""

import datetime
import warnings
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from minima.launcher import Launch, export_launch

# Rank 0 may write a long export while the others wait in a collective; DeepSpeed's own limit is 10 minutes.
TIMEOUT = datetime.timedelta(hours=2)


def start(launch: Launch) -> None:
    """Join the process group that the launcher described; a second call does nothing."""
    if dist.is_initialized():
        return
    # Two thousand lines a run about names that DeepSpeed, not we, will have to change.
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
    export_launch(launch)  # DeepSpeed reads rank and address from the environment only
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(launch.local_rank)
    deepspeed.init_distributed(
        dist_backend=accelerator.communication_backend_name() if accelerator.device_name() != "cpu" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=TIMEOUT,
        rank=launch.rank,
        world_size=launch.world_size,
    )


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number in the world."""
    return dist.get_rank()


def world_size() -> int:
    """Processes in the world."""
    return dist.get_world_size()


def is_main() -> bool:
    """Whether this is the one rank that writes shared files."""
    return dist.get_rank() == 0


def device() -> torch.device:
    """Where this rank computes."""
    return torch.device(get_accelerator().current_device_name())


def barrier() -> None:
    """Wait for every rank."""
    dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum of `tensor` over all ranks, in place and returned."""
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def gather_objects(value: Any) -> list[Any]:
    """What each rank gave, on every rank. For small facts of our own, never for data."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank."""
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]

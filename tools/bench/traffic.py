"""Count the bytes that collectives move and that are copied from host to device, where PyTorch dispatches them."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What one rank receives in an operation, relative to its largest list of tensors. All-gather and reduce-scatter move
# (n - 1) / n of the whole to each of n ranks, an all-reduce twice that (Thakur et al., 2005, sec. 4).
_WHOLE = {"allgather": 1.0, "reduce_scatter": 1.0, "allreduce": 2.0, "broadcast": 1.0, "alltoall": 1.0}


class TrafficCounter(TorchDispatchMode):
    """Counts while the context is active, in the thread that entered it.

    DeepSpeed prefetches weights from the thread that runs the model, so nothing of a frozen model's traffic is missed.
    On a GPU the backward pass runs in threads of its own, and what it moves is not counted.

    Attributes:
        collectives: bytes that this rank receives, by kind of operation: `allgather`, `reduce_scatter`, ...
        calls: number of calls, by kind of operation.
        host_to_device: bytes copied from the host's memory to the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collectives: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.host_to_device = 0

    @property
    def collective_bytes(self) -> int:
        """Bytes of all kinds of operation."""
        return sum(self.collectives.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = str(func).partition(".")
        if namespace == "c10d":
            self._collective(name.partition(".")[0].strip("_"), args, kwargs)
        elif name.startswith("copy_.") and args[1].device.type == "cpu" != args[0].device.type:
            self.host_to_device += _bytes(args[1])
        elif name.startswith("_to_copy.") and args[0].device.type == "cpu" != _target(kwargs):
            self.host_to_device += _bytes(args[0])
        return func(*args, **kwargs)

    def _collective(self, name: str, args: Any, kwargs: Any) -> None:
        kind = next((kind for kind in _WHOLE if name.startswith(kind)), None)
        if kind is None:
            return
        whole = max(sum(_bytes(leaf) for leaf in tree_leaves(part) if isinstance(leaf, Tensor)) for part in args)
        groups = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.ScriptObject)]
        ranks = next((size for group in groups if (size := _size(group)) is not None), dist.get_world_size())
        self.collectives[kind] += int(_WHOLE[kind] * whole * (ranks - 1) / ranks)
        self.calls[kind] += 1


def _target(kwargs: dict[str, Any]) -> str:
    return torch.device(kwargs.get("device") or "cpu").type


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _size(group: Any) -> int | None:
    try:
        return dist.ProcessGroup.unbox(group).size()
    except (RuntimeError, TypeError):
        return None  # not a process group

"""A stock model built straight into ZeRO-3's shards: each rank reads its own part of every tensor."""

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from torch import Tensor, nn
from transformers import PreTrainedModel

from minima.engine import distributed
from minima.models.stock import DTYPES, build_empty
from minima.models.weights import WeightSource


def build_sharded(
    source: WeightSource, config: dict[str, Any], precision: str, group: dist.ProcessGroup | None = None
) -> PreTrainedModel:
    """Build a partitioned model and fill it with the source's weights.

    Args:
        source: weights and shape.
        config: DeepSpeed's configuration of the engine that will own the model.
        precision: `float32` or `bfloat16`; the dtype of the shards.
        group: ranks that one copy is divided among; all when not given.
    """
    dtype = DTYPES[precision]
    # The configuration tells zero.Init the dtype: on CPUs without float16 arithmetic, DeepSpeed 0.19 ignores a
    # `dtype=` argument and uses bfloat16.
    with deepspeed.zero.Init(data_parallel_group=group, config_dict_or_path=config):
        model = build_empty(source.config, dtype)
    assert all(parameter.dtype == dtype for _, parameter in sharded_parameters(model)), "zero.Init used another dtype"
    for name, parameter in sharded_parameters(model):
        _fill(parameter, read_shard(parameter, source, name))
    restore_rotary(model, distributed.device())
    return model


def _fill(parameter: Any, shard: Tensor) -> None:
    """Put a rank's part of a tensor where the parameter keeps it: in memory, or in a file on NVMe."""
    if parameter.ds_tensor.final_location != OffloadDeviceEnum.nvme:
        parameter.ds_tensor.data.copy_(shard)
        return
    swapper = parameter.nvme_swapper
    parameter.ds_tensor.data = swapper.get_buffer(parameter, parameter.ds_tensor.ds_numel)
    parameter.ds_tensor.data.copy_(shard)
    swapper.swap_out_and_release([parameter])


def restore_rotary(model: PreTrainedModel, device: torch.device) -> None:
    """Recompute the rotary frequencies in float32 and on the CPU: a GPU's powers differ in the last bit.

    zero.Init casts every new floating-point tensor to the weights' dtype, so with bfloat16 weights the frequencies
    would keep three digits: at position 4,096 the angles of the fastest dimensions could be off by a whole turn.
    """
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            fresh = type(module)(model.config)
            for name, buffer in fresh.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))


def release(root: nn.Module, optimizer: Any = None) -> None:
    """Free the memory of a partitioned model whose engine is destroyed, and of DeepSpeed's optimiser.

    DeepSpeed keeps every root that it ever wrapped in a global list, and its caches keep the modules of a model that
    has run; so the shards, and through each parameter the optimiser with its states, would stay until the process ends.
    """
    while root in FWD_MODULE_STACK:
        FWD_MODULE_STACK.remove(root)
    for parameter in root.parameters():
        parameter.data = parameter.data.new_empty(0)
        parameter.grad = None
        shard = parameter.__dict__.pop("ds_tensor", None)
        if shard is not None:
            shard.data = shard.data.new_empty(0)
        parameter.__dict__.pop("_z3_optimizer", None)
    if optimizer is not None:
        optimizer.optimizer.state.clear()  # hooks and closures still hold both objects, but no longer their tensors
        optimizer.optimizer.param_groups.clear()
        vars(optimizer).clear()


def sharded_parameters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and parameters of a partitioned model, with the `ds_` attributes that DeepSpeed gives them.

    `ds_tensor` is this rank's shard (its own `ds_numel` elements, padding included); `ds_shape` and `ds_numel` describe
    the whole parameter.
    """
    yield from model.named_parameters()


def shard_range(parameter: Any) -> tuple[int, int]:
    """The elements [start, stop) of the flattened parameter that this rank holds, without padding."""
    size = parameter.ds_tensor.ds_numel
    start = min(parameter.ds_zero_partition_rank * size, parameter.ds_numel)
    return start, min(start + size, parameter.ds_numel)


def read_shard(parameter: Any, source: WeightSource, name: str) -> Tensor:
    """This rank's part of the tensor `name`, as long as its shard of `parameter`: float32, zero-padded, read-only."""
    start, stop = shard_range(parameter)
    if stop - start == parameter.ds_tensor.ds_numel:
        return source.read_flat(name, start, stop).float()
    shard = torch.zeros(parameter.ds_tensor.ds_numel)
    if stop > start:
        shard[: stop - start] = source.read_flat(name, start, stop)
    return shard

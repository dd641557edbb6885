"""Bytes that each rank needs for a trained and for a frozen model, part by part, from shapes alone.

The parts of the trained model are those that DeepSpeed 0.19.8 allocates in `runtime/zero/stage3.py`:
`_create_fp16_partitions_with_defragmentation` (weights), `_create_fp32_partitions` (master weights),
`_setup_for_real_optimizer` (reduce bucket, gradients) and `_prepare_fp32_grad_for_sub_group` (a second copy of one
sub-group's gradients). `tests/distributed/test_memory_plan.py` compares them with the tensors of two real ranks.

`precision` is `float32` or `bfloat16`, of weights and activations; `checkpointing` is `none`, `selective` or `full`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from minima.models.shape import ModelShape
from minima.planning.activations import forward_bytes, recomputed_bytes, saved_bytes
from minima.planning.sharding import (
    BYTES,
    Sharding,
    layer_tensors,
    outer_tensors,
    persistent_elements,
    shard_elements,
    tensors,
)
from minima.recipe.distillation import Offload, Placement


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by part."""

    device: Mapping[str, int] = field(default_factory=dict)  # on the rank's device, permanently
    passing: Mapping[str, int] = field(default_factory=dict)  # on the device temporarily, at the peak within a step
    host: Mapping[str, int] = field(default_factory=dict)  # in host memory
    disk: Mapping[str, int] = field(default_factory=dict)  # in files

    @property
    def resident_bytes(self) -> int:
        """Bytes on the device between two steps."""
        return sum(self.device.values())

    @property
    def passing_bytes(self) -> int:
        """Bytes on the device only within a step."""
        return sum(self.passing.values())

    @property
    def device_bytes(self) -> int:
        """Bytes on the device at the peak."""
        return self.resident_bytes + self.passing_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory, all parts."""
        return sum(self.host.values())


@dataclass(frozen=True)
class Work:
    """What one rank processes at once."""

    micro_batch_sequences: int  # sequences per micro-batch
    sequence_length: int  # tokens per sequence
    chunk_tokens: int = 1024  # tokens whose logits are in memory at a time
    accumulation: int = 1  # micro-batches per step on one rank

    @property
    def tokens(self) -> int:
        """Tokens per micro-batch."""
        return self.micro_batch_sequences * self.sequence_length


def trained_memory(
    shape: ModelShape,
    precision: str,
    checkpointing: str,
    work: Work,
    ranks: int,
    sharding: Sharding,
    *,
    taught: bool = True,
) -> Memory:
    """Bytes on one rank of a model that is trained under ZeRO-3 over all ranks.

    Args:
        precision: `float32` or `bfloat16`, of weights and activations.
        ranks: number of ranks that share the model.
        taught: whether the loss also holds a teacher's logits.
    """
    size, shard = BYTES[precision], shard_elements(shape, ranks)
    table = shape.vocabulary_size * shape.hidden_size
    # Also in float32, master weights are a copy: DeepSpeed means to share them, but compares a device with its name.
    states = {"master": 4 * shard, "moments": 8 * shard, "gradients": 4 * shard}
    bucket = 4 * min(sharding.reduce_bucket_elements, shape.parameters)
    device = {"weights": size * shard, "persistent": _persistent(shape, precision, ranks, sharding)}
    host: dict[str, int] = {}
    if sharding.offload_optimizer:  # gradients lie there twice: where they add up, and where the optimiser reads them
        groups = -(-shard // sharding.sub_group_elements)
        buffers = [4 * shard, *[4 * -(-shard // groups)] * groups]
        host = states | {"gradients": sum(map(_page_locked, buffers)) if sharding.pinned else 2 * states["gradients"]}
        update = 0
    else:
        device |= states
        update = 4 * min(shard, sharding.sub_group_elements + max(tensors(shape)) // ranks)
    device["buckets"] = 4 * sharding.reduce_bucket_elements
    passing: dict[str, int] = {}
    if ranks > 1:
        # Prefetched weights lie in one buffer until the last of them is used, and each also in a buffer of its own.
        ahead = min(sharding.prefetch_elements, shape.num_layers * shape.layer_parameters)
        passing["gathered"] = size * (trained_gathered(shape, sharding) + ahead)
    # The whole head stays gathered from the loss to the end of the backward pass, with its float32 gradient. In
    # bfloat16 that gradient is rounded, then converted back to float32 for its reduction, while the loss's own memory
    # is still held.
    passing["head"] = (size * table if ranks > 1 else 0) + 4 * table
    again = 0 if precision == "float32" else 4 * table
    # The final hidden states count twice: the norm's output, and its gradient, which the loss computes with it.
    kept = saved_bytes(shape, precision, checkpointing, work.tokens, work.sequence_length)
    passing["activations"] = kept + 2 * size * work.tokens * shape.hidden_size
    logits = min(work.chunk_tokens, work.tokens) * shape.vocabulary_size
    loss = logits * ((8 if taught else 4) + (2 if precision == "bfloat16" else 0))
    # Layers run backward after the loss's chunks are freed. A whole layer's gradients, which replace what was
    # recomputed of it, are copied once more for the reduce-scatter.
    recomputed = recomputed_bytes(shape, precision, checkpointing, work.tokens)
    layer = again + max(recomputed, size * shape.layer_parameters) + bucket
    passing["loss or layer"] = max(loss, layer)
    passing["update"] = max(0, update - sum(passing.values()))  # what it needs beyond the backward pass
    return Memory(device, passing, host)


def frozen_memory(
    shape: ModelShape,
    precision: str,
    placement: Placement,
    offload: Offload,
    work: Work,
    group: int,
    sharding: Sharding,
    *,
    window: int = 1,
) -> Memory:
    """Bytes on one rank of a frozen model that computes final hidden states.

    Args:
        offload: where its shards lie: `none` for the device, `cpu` or `nvme`.
        group: number of ranks that share one copy.
        window: micro-batches that one traversal of the layers serves.
    """
    size, tokens = BYTES[precision], work.tokens
    hidden = size * shape.hidden_size * tokens * window
    head = size * shape.vocabulary_size * shape.hidden_size
    if placement == "replica":
        layer = forward_bytes(shape, precision, tokens)
        return Memory({"weights": size * shape.parameters}, {"activations": layer, "hidden": hidden})
    if placement == "tensor_parallel":
        inputs = size * shape.hidden_size * tokens * group
        layer = inputs + forward_bytes(shape, precision, tokens * group, group)
        weights = {"weights": size * split_elements(shape, group), "head": head}
        return Memory(weights, {"activations": layer, "hidden": hidden})
    gathered = size * frozen_gathered(shape, sharding) if group > 1 or offload != "none" else 0
    device = {"head": head, "persistent": _persistent(shape, precision, group, sharding)}
    passing = {"activations": forward_bytes(shape, precision, tokens), "hidden": hidden}
    passing["gathered"] = gathered
    shard = size * shard_elements(shape, group)
    if offload == "none":
        return Memory(device | {"weights": shard}, passing)
    if offload == "cpu":
        return Memory(device, passing, {"weights": _pinned(shape, size, group) if sharding.pinned else shard})
    buffers = size * sharding.nvme_buffers * sharding.nvme_buffer_elements
    return Memory(device, passing, {"buffers": buffers}, {"weights": shard})


def scored_memory(shape: ModelShape, precision: str, work: Work, ranks: int, sharding: Sharding) -> Memory:
    """Bytes on one rank of a frozen model whose importance is measured.

    No weight has a gradient, but the loss's gradient flows through all layers.
    """
    size, tokens = BYTES[precision], work.tokens
    on_host = sharding.offload_weights != "none"
    head, gathered = 0, 0
    if ranks > 1 or on_host:
        head = size * shape.vocabulary_size * shape.hidden_size
        ahead = min(sharding.prefetch_elements, shape.num_layers * shape.layer_parameters)
        gathered = size * (trained_gathered(shape, sharding, layers=False) + ahead)
    kept = saved_bytes(shape, precision, "full", tokens, work.sequence_length) + 2 * size * tokens * shape.hidden_size
    loss = min(work.chunk_tokens, tokens) * shape.vocabulary_size * (4 + (2 if precision == "bfloat16" else 0))
    layer = recomputed_bytes(shape, precision, "full", tokens)
    weights = {"weights": size * shard_elements(shape, ranks)}
    device = ({} if on_host else weights) | {"persistent": _persistent(shape, precision, ranks, sharding)}
    # The head is released before the layers run backward: nothing needs its gradient.
    passing = {"gathered": gathered, "activations": kept + max(head + loss, layer)}
    return Memory(device, passing, weights if on_host else {})


def split_elements(shape: ModelShape, ranks: int) -> int:
    """Elements of one rank's part when matrices are split over `ranks`; embeddings and norms stay whole.

    An untied head is split like the layers' matrices, although only a whole copy of it is ever used.
    """
    width = shape.hidden_size
    small = 2 * shape.norm_parameters
    layer = sum(layer_tensors(shape)) - small
    table = shape.vocabulary_size * width
    head = 0 if shape.tied else table
    outer = sum(outer_tensors(shape)) - head
    return outer + -(-head // ranks) + shape.num_layers * (-(-layer // ranks) + small)


def _persistent(shape: ModelShape, precision: str, group: int, sharding: Sharding) -> int:
    return BYTES[precision] * persistent_elements(shape, sharding) if group > 1 else 0


def trained_gathered(shape: ModelShape, sharding: Sharding, *, layers: bool = True) -> int:
    """The most elements that are gathered at one time in a step of a trained model, without the head.

    DeepSpeed's prefetcher keeps gathered what the backward pass will need again, up to `live_elements`, and whatever is
    reused within `reuse_elements`. Where layers are gathered as a whole, that distance counts from the end of the
    forward pass; the embeddings' is 0.

    Args:
        layers: whether a layer is gathered as a whole, and so kept.
    """
    table, layer = shape.vocabulary_size * shape.hidden_size, shape.layer_parameters
    every = shape.parameters - table
    kept = sharding.live_elements - table if sharding.prefetch_elements else 0
    if layers:
        kept = kept if kept >= every else kept - kept % layer
        if sharding.reuse_elements:
            near = layer * -(-sharding.reuse_elements // layer)
            kept = max(kept, near) + (0 if shape.tied else table)
    elif not sharding.prefetch_elements:
        kept = sharding.reuse_elements // 2 - table
    return min(every, max(kept, layer + sharding.prefetch_elements))


def frozen_gathered(shape: ModelShape, sharding: Sharding) -> int:
    """The most elements that are gathered at one time in a frozen model.

    A layer or the embeddings, plus prefetched weights: in one buffer until the last of them is used, and each also in a
    buffer of its own.
    """
    layer, layers = shape.layer_parameters, shape.num_layers * shape.layer_parameters
    ahead = min(layers, sharding.prefetch_elements)
    table = shape.vocabulary_size * shape.hidden_size
    return max(2 * layer, max(table, layer if layers > ahead else 0) + 2 * ahead)


def _pinned(shape: ModelShape, size: int, ranks: int) -> int:
    """Bytes of one rank's shards in page-locked memory."""
    return sum(_page_locked(size * -(-elements // ranks)) for elements in tensors(shape))


def _page_locked(size: int) -> int:
    """Bytes that `size` bytes of page-locked memory take: PyTorch allocates it in powers of two."""
    return 1 << (size - 1).bit_length()

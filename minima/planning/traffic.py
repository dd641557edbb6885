"""Bytes that travel in one optimiser step: between ranks, between nodes, and from the host or a disk.

Collectives are counted as NCCL's rings: to gather a tensor, each rank receives all of it but its own part from its
neighbour; a reduce-scatter moves as much. One rank of each node has its neighbour on another node.
`precision` is that of the weights that travel: `float32` or `bfloat16`.
"""

from dataclasses import dataclass, fields

from minima.models.shape import ModelShape
from minima.planning.memory import Work, trained_gathered
from minima.planning.sharding import BYTES, Sharding, persistent_elements
from minima.recipe.distillation import Offload, Placement


@dataclass(frozen=True)
class Traffic:
    """Bytes per rank in one optimiser step."""

    received: float = 0.0  # from all other ranks
    # the part of `received` that comes from another node; only one rank of a node receives it, and this is the average
    # over the node's ranks
    between_nodes: float = 0.0
    from_host: float = 0.0  # copied from host memory to the device
    to_host: float = 0.0  # copied from the device to host memory
    from_disk: float = 0.0  # read from files into host memory

    @property
    def within_node(self) -> float:
        """Bytes from ranks of the same node."""
        return self.received - self.between_nodes

    def __add__(self, other: "Traffic") -> "Traffic":
        """The sum of both."""
        return Traffic(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)})


def trained_traffic(
    shape: ModelShape, precision: str, work: Work, ranks: int, ranks_per_node: int, sharding: Sharding
) -> Traffic:
    """Bytes per step of a model that is trained under ZeRO-3 over all ranks.

    Each micro-batch gathers all weights for its forward pass, and for its backward pass those that were not kept;
    float32 gradients are reduce-scattered once per micro-batch. Recomputing a layer gathers nothing more: its weights
    are whole for its backward pass anyway.
    """
    travelling = shape.parameters - persistent_elements(shape, sharding)
    # The head is not kept: its next use comes after the root's forward, unless the JSON's reuse distance covers it.
    table = shape.vocabulary_size * shape.hidden_size
    head = table if sharding.prefetch_elements and sharding.reuse_elements >= table else 0
    kept = min(travelling, trained_gathered(shape, sharding) + head)
    weights = BYTES[precision] * (2 * travelling - kept)
    gradients = 4 * shape.parameters
    size = work.accumulation * (weights + gradients)
    travelled = _ring(size, ranks, ranks_per_node)
    if not sharding.offload_optimizer:
        return Traffic(**travelled)
    # Each micro-batch's gradients go to the host and come back to be accumulated; the last ones go there once more.
    part = shape.parameters / ranks
    from_host = 4 * part * work.accumulation + BYTES[precision] * part
    return Traffic(**travelled, from_host=from_host, to_host=4 * part * (work.accumulation + 1))


def frozen_traffic(
    shape: ModelShape,
    precision: str,
    placement: Placement,
    offload: Offload,
    work: Work,
    group: int,
    ranks_per_node: int,
    sharding: Sharding,
    *,
    window: int = 1,
) -> Traffic:
    """Bytes per step of a frozen model that computes final hidden states.

    Shards are gathered, and fetched, once per window. Split matrices give partial sums of hidden states, which are
    all-reduced over the group twice per layer, for the sequences of all its ranks.

    Args:
        group: number of ranks that share one copy.
        window: micro-batches that one traversal of the layers serves.
    """
    size = BYTES[precision]
    if placement == "replica":
        return Traffic()
    if placement == "tensor_parallel":
        hidden = size * shape.hidden_size * work.tokens * group
        # An all-reduce is a reduce-scatter and an all-gather.
        return Traffic(**_ring(2 * 2 * shape.num_layers * hidden * work.accumulation, group, ranks_per_node))
    traversals = -(-work.accumulation // window)
    head = 0 if shape.tied else shape.vocabulary_size * shape.hidden_size  # whole on each rank from the start
    weights = size * (shape.parameters - head - persistent_elements(shape, sharding)) * traversals
    shards = weights / group
    return Traffic(
        **_ring(weights, group, ranks_per_node),
        from_host=0.0 if offload == "none" else shards,
        from_disk=shards if offload == "nvme" else 0.0,
    )


def _ring(size: float, group: int, ranks_per_node: int) -> dict[str, float]:
    received = size * (group - 1) / group
    return {"received": received, "between_nodes": received / ranks_per_node if group > ranks_per_node else 0.0}

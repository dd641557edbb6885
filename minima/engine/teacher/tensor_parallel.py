"""A frozen model whose matrices are split over a few ranks of one node (DeepSpeed's AutoTP).

The ranks of a group must run the same input. So they gather each other's sequences, all run all of them, and each
keeps its own results.

Shapes: B sequences of one rank, T tokens, E width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_tp import AutoTP
from deepspeed.utils import groups
from torch import Tensor, nn
from transformers import PreTrainedModel

from minima.batch import Batch
from minima.engine import distributed
from minima.errors import RecipeError, ShapeError
from minima.models.causal_lm import head_weight, hidden_states
from minima.models.shape import ModelShape
from minima.models.stock import DTYPES, build_empty
from minima.models.weights import WeightSource

# Globals that AutoTP leaves behind. Engines that are built later, including the student's, would take them for theirs.
_GLOBALS = ("mpu", "_TENSOR_MODEL_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP")


class TensorParallel:
    """One copy of a frozen model on each group of ranks.

    Args:
        source: weights and shape. Every rank reads all of them, one at a time, and keeps its part of each.
        config: DeepSpeed's, stage 0; `tensor_parallel.autotp_size` is the number of ranks in a group.
        precision: `float32` or `bfloat16`.
        layers: called with the split model.
        documents: whether batches may have documents; the same on all ranks, because their batches are merged.
    """

    def __init__(
        self,
        source: WeightSource,
        config: dict[str, Any],
        precision: str,
        *,
        layers: Callable[[PreTrainedModel], None] = lambda model: None,
        documents: bool = True,
    ) -> None:
        self.documents = documents
        size = config["tensor_parallel"]["autotp_size"]
        check_split(ModelShape.from_config(source.config), size)
        check_group(distributed.node_ranks(), size)
        with torch.device("cpu"):
            model = build_empty(source.config, DTYPES[precision]).eval()
        head = head_weight(model)
        self._source, self._head_name = source, next(name for name, p in model.named_parameters() if p is head)
        with _without_traces(), _filling(model, source):
            self._engine = deepspeed.initialize(model=model, config=config)[0]
            self._group = groups.get_tensor_model_parallel_group()
        if self._engine.first_dataloader_check is not None:
            self._engine.first_dataloader_check.remove()  # compares inputs on the host; ours are the same
        self.model: PreTrainedModel = self._engine.module
        self.model.requires_grad_(False)
        assert dist.get_world_size(self._group) == size, "another group"
        for parameter in self.model.parameters():  # a view would keep the whole matrix alive
            if parameter.untyped_storage().nbytes() > parameter.numel() * parameter.element_size():
                parameter.data = parameter.data.clone()
        layers(self.model)

    def call(self, function: Callable[[PreTrainedModel, Batch], Any], batch: Batch) -> Any:
        """Not supported: the function would see only one rank's part of a split model."""
        raise AssertionError("a split model gives hidden states only")

    def hidden_states(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Final hidden states [B, T, E] of each micro-batch; all ranks of the group pass equally many, of one size."""
        rank, found = dist.get_rank(self._group), []
        for batch in batches:
            size = len(batch.input_ids_BT)
            hidden = hidden_states(self.model, self._gathered(batch))
            found.append(hidden[rank * size : (rank + 1) * size].clone())
        return found

    def _gathered(self, batch: Batch) -> Batch:
        ids_BT = batch.input_ids_BT
        if not self.documents:
            return Batch(self._all(ids_BT), ids_BT)
        documents_BT, positions_BT = batch.documents_BT, batch.positions_BT
        if documents_BT is None or positions_BT is None:
            documents_BT = torch.zeros_like(ids_BT)
            positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        ids, documents, positions = (self._all(tensor) for tensor in (ids_BT, documents_BT, positions_BT))
        return Batch(ids, ids, documents_BT=documents, positions_BT=positions)

    def _all(self, tensor_BT: Tensor) -> Tensor:
        ranks = dist.get_world_size(self._group)
        gathered = tensor_BT.new_empty((ranks * tensor_BT.shape[0], *tensor_BT.shape[1:]))
        dist.all_gather_into_tensor(gathered, tensor_BT.contiguous(), group=self._group)
        return gathered

    def head(self) -> Tensor:
        """The whole output head [V, E], read from the source: the model's own is split over the ranks."""
        dtype, device = next(self.model.parameters()).dtype, distributed.device()
        return self._source.read(self._head_name).to(device, dtype)

    def held_bytes(self) -> dict[str, int]:
        """Bytes of weights that this rank keeps, all of them on the `device`."""
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in self.model.parameters()}
        return {"device": sum(storages.values()), "host": 0, "nvme": 0}

    def close(self) -> None:
        """Free the memory."""
        self._engine.destroy()
        for parameter in self.model.parameters():
            parameter.data = parameter.data.new_empty(0)
        del self._engine, self.model


@contextmanager
def _without_traces() -> Iterator[None]:
    before = {name: getattr(groups, name) for name in _GLOBALS}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(groups, name, value)


@contextmanager
def _filling(model: PreTrainedModel, source: WeightSource) -> Iterator[None]:
    """Fill each matrix just before AutoTP splits it, so that no rank ever holds all of them; fill the rest at the end.

    At that point AutoTP gathers the matrices of models in ZeRO-3's shards; that step is replaced. A parameter that is
    not filled yet takes no memory: nothing has touched its pages.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def fill(_: Any, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            if (name := names.pop(id(parameter), None)) is not None:
                parameter.data = source.read(name).to(parameter.dtype)

    original = AutoTP._gather_zero3_params
    AutoTP._gather_zero3_params = fill
    try:
        yield
    finally:
        AutoTP._gather_zero3_params = original
    for parameter in model.parameters():
        if (name := names.pop(id(parameter), None)) is not None:
            parameter.data.copy_(source.read(name))
    assert not names, f"split before it was filled: {', '.join(names.values())}"


def check_split(shape: ModelShape, ranks: int) -> None:
    """Refuse a model that AutoTP cannot split evenly.

    Raises:
        ShapeError: the heads are not divisible by the ranks, or AutoTP does not know the family.
        RecipeError: a single rank, for which AutoTP makes no group.
    """
    if ranks == 1:
        raise RecipeError(
            "placement tensor_parallel over a single rank",
            "it has no other rank to share the matrices with",
            "use placement replica, or start more ranks",
        )
    if shape.family == "gpt2":
        raise ShapeError(
            "placement tensor_parallel for a gpt2",
            "DeepSpeed's AutoTP does not split this family",
            "use placement zero3_node, which needs as little memory",
        )
    if shape.num_key_value_heads % ranks or shape.num_heads % ranks:
        raise ShapeError(
            f"placement tensor_parallel over {ranks} ranks for a model of {shape.num_heads} heads and "
            f"{shape.num_key_value_heads} key-value heads",
            "each rank computes whole heads, and the same number of them",
            "set tensor_parallel_ranks to a number that divides both, or use placement zero3_node",
        )


def check_group(nodes: list[list[int]], ranks: int) -> None:
    """Refuse groups that would span nodes; AutoTP groups consecutive ranks.

    Raises:
        RecipeError: the ranks of some node do not form whole groups.
    """
    split = [node[start : start + ranks] for node in nodes for start in range(0, len(node), ranks)]
    if any(group[0] % ranks or group != list(range(group[0], group[0] + ranks)) for group in split):
        sizes = ", ".join(str(len(node)) for node in nodes)
        raise RecipeError(
            f"placement tensor_parallel over {ranks} ranks on nodes of {sizes} ranks",
            "each layer sums over its group, which must be consecutive ranks of one node",
            "set tensor_parallel_ranks to a number that divides the ranks of a node, or use placement zero3_node",
        )

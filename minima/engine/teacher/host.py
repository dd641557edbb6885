"""A frozen model: distillation teacher, preference reference or measured model, wherever its weights live."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minima.batch import Batch
from minima.engine import distributed
from minima.engine.memory import return_unused
from minima.engine.teacher.replica import Replica
from minima.engine.teacher.tensor_parallel import TensorParallel
from minima.engine.teacher.zero3 import Zero3
from minima.models.compiling import decoder_layers, recompute
from minima.models.weights import WeightSource
from minima.recipe.distillation import Placement

R = TypeVar("R")


class FrozenHost:
    """A model without gradients of its own.

    Every rank must make the same calls in the same order: a call may gather weights from the others.

    Args:
        source: weights and shape.
        deepspeed_config: from `deepspeed_config.frozen_config`, for the same placement.
        precision: `float32` or `bfloat16`.
        placement: where the weights live; see `recipe.distillation.Teacher`.
        activation_checkpointing: recompute each layer in `run`'s backward pass instead of keeping its activations.
        windows: `window` will be given several micro-batches.
        documents: whether batches may have documents; matters to `tensor_parallel`, where ranks merge their batches.
        layers: called with the built model before DeepSpeed hooks it, to replace kernels or to compile.
    """

    def __init__(
        self,
        source: WeightSource,
        deepspeed_config: dict[str, Any],
        *,
        precision: str,
        placement: Placement = "zero3",
        activation_checkpointing: bool = False,
        windows: bool = False,
        documents: bool = True,
        layers: Callable[[PreTrainedModel], None] = lambda model: None,
    ) -> None:
        self.config = source.config
        self.device = distributed.device()
        self.placement = placement

        def prepare(model: PreTrainedModel) -> None:
            layers(model)
            if activation_checkpointing:
                _recompute(model)

        self._place: Replica | TensorParallel | Zero3
        if placement == "replica":
            self._place = Replica(source, deepspeed_config, precision, layers=prepare)
        elif placement == "tensor_parallel":
            self._place = TensorParallel(source, deepspeed_config, precision, layers=prepare, documents=documents)
        else:
            group = distributed.node_group() if placement == "zero3_node" else None
            self._place = Zero3(source, deepspeed_config, precision, group=group, layers=prepare, windows=windows)
        self._head_VE: Tensor | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The stock model; which of its weights this rank holds depends on the placement."""
        return self._place.model

    @property
    def head_VE(self) -> Tensor:
        """The output head [V, E], whole on every rank; gathered once, at the first use."""
        if self._head_VE is None:
            self._head_VE = self._place.head()
        return self._head_VE

    def hidden_states(self, batch: Batch) -> Tensor:
        """Final hidden states [B, T, E] of `batch`, without gradients."""
        return self.window([batch])[0]

    def window(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Final hidden states of several micro-batches, without gradients, each as if it had run alone.

        If the host was made with `windows`, weights that must be gathered or fetched travel once for all of them.
        """
        with torch.no_grad():
            return self._place.hidden_states(batches)

    def run(self, forward: Callable[[PreTrainedModel, Batch], R], batch: Batch) -> R:
        """The result of `forward(model, batch)`, called inside the root's forward.

        Gradients flow to whatever `forward` uses that requires them (masks, for example), never to the weights. It must
        return a tensor or a tuple of tensors: ZeRO-3 looks for them where they leave the root.
        """
        return self._place.call(forward, batch)

    def held_bytes(self) -> dict[str, int]:
        """Bytes of weights that this rank keeps between calls, by where they lie: `device`, `host`, `nvme`."""
        return self._place.held_bytes()

    def close(self) -> None:
        """Free the memory."""
        self._head_VE = None
        self._place.close()
        return_unused()


def _recompute(model: PreTrainedModel) -> None:
    recompute(model, "full")
    for layer in decoder_layers(model):  # a layer recomputes only in training mode; the dropouts inside it stay off
        layer.training = True

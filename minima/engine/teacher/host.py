"""A frozen model on a ZeRO-3 engine: distillation teacher, preference reference, or a model that is measured."""

from collections.abc import Callable
from typing import Any, TypeVar

import deepspeed
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from minima.batch import Batch
from minima.engine import distributed
from minima.engine.sharded import build_sharded, release
from minima.models.causal_lm import head_weight, hidden_states
from minima.models.weights import WeightSource

R = TypeVar("R")


class _FrozenRoot(nn.Module):
    """What DeepSpeed wraps. Whatever reads parameters runs inside this forward, where ZeRO-3's hooks gather them."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[PreTrainedModel, Batch], Any], batch: Batch) -> Any:
        return function(self.model, batch)


class FrozenHost:
    """A model without gradients of its own, sharded over all ranks.

    Every rank has to make the same calls in the same order: each call gathers shards from all of them.

    Args:
        source: weights and shape.
        deepspeed_config: from `deepspeed_config.frozen_config`.
        precision: `float32` or `bfloat16`.
        activation_checkpointing: recompute each layer in `run`'s backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        source: WeightSource,
        deepspeed_config: dict[str, Any],
        *,
        precision: str,
        activation_checkpointing: bool = False,
    ) -> None:
        self.config = source.config
        self.device = distributed.device()
        self.model = build_sharded(source, deepspeed_config, precision)
        self.model.requires_grad_(False)
        self.model.eval()
        if activation_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            for module in self.model.modules():  # a layer checkpoints in training mode only; dropouts below it stay off
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True
        # No optimiser here and none in the configuration: DeepSpeed then only shards and gathers.
        root = _FrozenRoot(self.model)
        root.training = False  # not eval(), which would reach into the layers
        self._engine = deepspeed.initialize(model=root, config=deepspeed_config)[0]
        self._root = self._engine.module
        self._head_VE: Tensor | None = None

    @property
    def head_VE(self) -> Tensor:
        """The output head [V, E], whole on every rank; gathered once, at the first use."""
        if self._head_VE is None:
            weight = head_weight(self.model)
            with deepspeed.zero.GatheredParameters([weight]):
                self._head_VE = weight.detach().clone()
        return self._head_VE

    def hidden_states(self, batch: Batch) -> Tensor:
        """Final hidden states [B, T, E] of `batch`, without gradients."""
        with torch.no_grad():
            return self._root(_backbone, batch)

    def run(self, forward: Callable[[PreTrainedModel, Batch], R], batch: Batch) -> R:
        """What `forward(model, batch)` gives inside the root's forward.

        Gradients flow to whatever `forward` uses that requires them (masks, say), never to the weights. What it
        returns has to be a tensor or a tuple of tensors: ZeRO-3 looks for them where they leave the root.
        """
        return self._root(forward, batch)

    def close(self) -> None:
        """Give the engine's memory back."""
        self._engine.destroy()
        root = self._root
        del self._engine, self._root, self.model
        self._head_VE = None
        release(root)


def _backbone(model: PreTrainedModel, batch: Batch) -> Tensor:
    return hidden_states(model, batch)

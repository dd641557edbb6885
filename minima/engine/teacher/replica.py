"""A whole copy of a frozen model on each rank: no weights travel, but every rank needs memory for all of them."""

from collections.abc import Callable, Sequence
from typing import Any

import deepspeed
import torch
from torch import Tensor
from transformers import PreTrainedModel

from minima.batch import Batch
from minima.engine import distributed
from minima.engine.sharded import restore_rotary
from minima.engine.teacher.root import FrozenRoot
from minima.models.causal_lm import head_weight, hidden_states
from minima.models.linear_layers import use_cpu_products
from minima.models.stock import DTYPES, build_empty
from minima.models.weights import WeightSource


class Replica:
    """A whole copy on this rank's device.

    Args:
        source: weights and shape; read by every rank.
        config: DeepSpeed's, stage 0 and without an optimiser.
        precision: `float32` or `bfloat16`.
        layers: called with the built model.
    """

    def __init__(
        self,
        source: WeightSource,
        config: dict[str, Any],
        precision: str,
        *,
        layers: Callable[[PreTrainedModel], None] = lambda model: None,
    ) -> None:
        self.model = build_whole(source, precision, distributed.device())
        use_cpu_products(self.model)
        layers(self.model)
        self._engine = deepspeed.initialize(model=FrozenRoot(self.model), config=config)[0]
        self._root = self._engine.module

    def call(self, function: Callable[[PreTrainedModel, Batch], Any], batch: Batch) -> Any:
        """The result of `function(model, batch)`."""
        return self._root(function, batch)

    def hidden_states(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Final hidden states [B, T, E] of each micro-batch."""
        return [self._root(hidden_states, batch) for batch in batches]

    def head(self) -> Tensor:
        """The output head [V, E], which is the model's own."""
        return head_weight(self.model).detach()

    def held_bytes(self) -> dict[str, int]:
        """Bytes of weights that this rank keeps, all of them on the `device`."""
        parameters = self.model.parameters()
        return {"device": sum(p.numel() * p.element_size() for p in parameters), "host": 0, "nvme": 0}

    def close(self) -> None:
        """Free the memory."""
        self._engine.destroy()
        for parameter in self.model.parameters():
            parameter.data = parameter.data.new_empty(0)
        del self._engine, self._root, self.model


def build_whole(source: WeightSource, precision: str, device: torch.device) -> PreTrainedModel:
    """Build a whole frozen model on a device and fill it tensor by tensor."""
    with device:
        model = build_empty(source.config, DTYPES[precision])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.read(name))
    restore_rotary(model, device)
    model.requires_grad_(False)
    return model.eval()

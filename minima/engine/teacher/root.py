"""What DeepSpeed wraps of a frozen model."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from minima.batch import Batch
from minima.models.causal_lm import hidden_states


class FrozenRoot(nn.Module):
    """Whatever reads parameters runs inside this forward, where ZeRO-3's hooks gather them."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.training = False  # not eval(), which would reach into layers that recompute

    def forward(self, function: Callable[[PreTrainedModel, Any], Any], batches: Any) -> Any:
        return function(self.model, batches)


def backbone_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Final hidden states [B, T, E] of one micro-batch."""
    return hidden_states(model, batch)

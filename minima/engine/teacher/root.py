"""The root module that DeepSpeed wraps for a frozen model."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel


class FrozenRoot(nn.Module):
    """Runs whatever reads parameters inside its forward, where ZeRO-3's hooks gather them."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.training = False  # not eval(), which would also switch layers that recompute

    def forward(self, function: Callable[[PreTrainedModel, Any], Any], batches: Any) -> Any:
        return function(self.model, batches)

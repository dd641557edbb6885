"""Next-token prediction: the objective of adaptation, and of every held-out loss."""

from torch import Tensor
from transformers import PreTrainedModel

from minima.batch import Batch
from minima.engine.objectives.objective import valid_tokens
from minima.losses import LossSum, linear_cross_entropy
from minima.models.causal_lm import head_weight, hidden_states


class LanguageModelling:
    """Cross-entropy with the next token.

    Args:
        chunk_tokens: tokens whose logits exist at one time.
    """

    window = 1

    def __init__(self, chunk_tokens: int = 1024) -> None:
        self.chunk_tokens = chunk_tokens

    def count(self, batch: Batch) -> Tensor:
        return valid_tokens(batch)

    def prepare(self, batches: list[Batch]) -> list[Batch]:
        return batches

    def __call__(self, model: PreTrainedModel, batch: Batch) -> LossSum:
        hidden_ND = hidden_states(model, batch).flatten(0, 1)
        return linear_cross_entropy(
            hidden_ND, head_weight(model), batch.labels_BT.flatten(), chunk_tokens=self.chunk_tokens
        )

"""Next-token prediction: the objective of adaptation, instruction tuning and every held-out loss."""

from torch import Tensor
from transformers import PreTrainedModel

from minima.batch import Batch
from minima.engine.objectives.neftune import noisy_embeddings
from minima.engine.objectives.objective import valid_tokens
from minima.losses import LossSum, linear_cross_entropy
from minima.models.causal_lm import head_weight, hidden_states


class LanguageModelling:
    """Cross-entropy with the next token.

    Args:
        chunk_tokens: tokens whose logits are in memory at a time.
        neftune_alpha: scale of the noise on the embeddings; 0 for none.
        seed: the noise's seed.
    """

    window = 1

    def __init__(self, chunk_tokens: int = 1024, *, neftune_alpha: float = 0.0, seed: int = 0) -> None:
        self.chunk_tokens, self.neftune_alpha, self.seed = chunk_tokens, neftune_alpha, seed

    def begin(self, step: int, total_steps: int) -> dict[str, float]:
        return {}

    def count(self, batch: Batch) -> Tensor:
        return valid_tokens(batch)

    def prepare(self, batches: list[Batch]) -> list[Batch]:
        return batches

    def __call__(self, model: PreTrainedModel, batch: Batch) -> LossSum:
        embeddings_BTD = None
        if self.neftune_alpha:
            embeddings_BTD = noisy_embeddings(model, batch, self.neftune_alpha, self.seed)
        hidden_ND = hidden_states(model, batch, embeddings_BTD).flatten(0, 1)
        return linear_cross_entropy(
            hidden_ND, head_weight(model), batch.labels_BT.flatten(), chunk_tokens=self.chunk_tokens
        )

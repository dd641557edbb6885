"""Direct preference optimisation: prefer the chosen answers, measured against a frozen reference."""

from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from minima.batch import Batch
from minima.engine.reference import Reference, answer_lengths, answer_log_probs
from minima.losses import LossSum, preference_loss, valid_pairs
from minima.models.causal_lm import head_weight, hidden_states


class Preference:
    """A loss over pairs of answers (see `losses.preference`); batches are blocks of a store of preferences.

    A pair counts if both its answers have labels, so masked blocks and padding count nothing.

    Args:
        reference: runs in `prepare`, never inside the student's forward.
        loss: `sigmoid` or `ipo`.
        beta: strength of the pull towards the reference.
        label_smoothing: probability that a pair is labelled the wrong way round; `sigmoid` only.
        length_normalised: use mean log-probabilities per token.
        chunk_tokens: tokens whose logits are in memory at a time.
    """

    window = 1

    def __init__(
        self,
        reference: Reference,
        *,
        loss: Literal["sigmoid", "ipo"] = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        length_normalised: bool = False,
        chunk_tokens: int = 1024,
    ) -> None:
        self.reference = reference
        self.loss, self.beta, self.label_smoothing = loss, beta, label_smoothing
        self.length_normalised, self.chunk_tokens = length_normalised, chunk_tokens

    def begin(self, step: int, total_steps: int) -> dict[str, float]:
        return {}

    def count(self, batch: Batch) -> Tensor:
        return valid_pairs(answer_lengths(batch)).sum()

    def prepare(self, batches: list[Batch]) -> list[Batch]:
        return [batch._replace(reference_BS=self.reference(batch)) for batch in batches]

    def __call__(self, model: PreTrainedModel, batch: Batch) -> LossSum:
        return self.loss_sum(hidden_states(model, batch), head_weight(model), batch)

    def loss_sum(self, hidden_BTD: Tensor, head_VD: Tensor, batch: Batch) -> LossSum:
        """The loss from a policy's final hidden states and head; also used for a policy that is only measured."""
        assert batch.reference_BS is not None, "prepare() runs first"
        return preference_loss(
            answer_log_probs(hidden_BTD, head_VD, batch, self.chunk_tokens),
            batch.reference_BS,
            answer_lengths(batch),
            loss=self.loss,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            length_normalised=self.length_normalised,
        )

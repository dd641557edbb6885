"""The published objective: half the text's cross-entropy, half the frozen teacher's; and its variants."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from minima.batch import Batch
from minima.engine.objectives.objective import valid_tokens
from minima.engine.teacher.host import FrozenHost
from minima.losses import LossSum, linear_cross_entropy, linear_distillation_loss
from minima.models.causal_lm import head_weight, hidden_states
from minima.recipe.loss_weights import WeightSchedule, weight_at


class Distillation:
    """Cross-entropy with the text, and a divergence from a frozen teacher (arXiv 2311.07052, sec. 3).

    A weight that follows a schedule is set by `begin`. In steps where it is 0, its part is still computed, so that each
    step does the same work on every rank and the logged mean covers all steps.

    Args:
        teacher: runs in `prepare` and gives final hidden states; its logits exist only in chunks inside the loss.
            None, with a `soft_weight` of 0, for the text alone.
        hard_weight: weight of the cross-entropy with the text.
        soft_weight: weight of the teacher's part.
        temperature: divides both models' logits in the teacher's part.
        chunk_tokens: tokens whose logits are in memory at a time.
        window: micro-batches that one traversal of the teacher's layers serves.
        soft_options: keywords of `linear_distillation_loss` that define the teacher's part.
    """

    def __init__(
        self,
        teacher: FrozenHost | None,
        *,
        hard_weight: float | WeightSchedule = 0.5,
        soft_weight: float | WeightSchedule = 0.5,
        temperature: float = 1.0,
        chunk_tokens: int = 1024,
        window: int = 1,
        **soft_options: Any,
    ) -> None:
        assert (teacher is None) == (soft_weight == 0), "a teacher without weight would run for nothing"
        self.teacher, self.window = teacher, window
        self.teacher_head_VE = None if teacher is None else teacher.head_VE  # gathered here, outside any forward
        self._weights = {"hard_weight": hard_weight, "soft_weight": soft_weight}
        self._scheduled = [name for name, weight in self._weights.items() if isinstance(weight, WeightSchedule)]
        self.begin(0, 1)
        self.temperature, self.chunk_tokens, self.soft_options = temperature, chunk_tokens, soft_options

    def begin(self, step: int, total_steps: int) -> dict[str, float]:
        now = {name: weight_at(weight, step, total_steps) for name, weight in self._weights.items()}
        self.hard_weight, self.soft_weight = now["hard_weight"], now["soft_weight"]
        return {name: now[name] for name in self._scheduled}

    def count(self, batch: Batch) -> Tensor:
        return valid_tokens(batch)

    def prepare(self, batches: list[Batch]) -> list[Batch]:
        if self.teacher is None:
            return batches
        hidden = self.teacher.window(batches)
        return [batch._replace(teacher_hidden_BTE=states) for batch, states in zip(batches, hidden, strict=True)]

    def __call__(self, model: PreTrainedModel, batch: Batch) -> LossSum:
        hidden_ND = hidden_states(model, batch).flatten(0, 1)
        labels_N = batch.labels_BT.flatten()
        if self.teacher_head_VE is None:
            hard = linear_cross_entropy(hidden_ND, head_weight(model), labels_N, chunk_tokens=self.chunk_tokens)
            return LossSum(self.hard_weight * hard.total, hard.count, {"hard": hard.total.detach()})
        assert batch.teacher_hidden_BTE is not None, "prepare() runs first"
        return linear_distillation_loss(
            hidden_ND,
            head_weight(model),
            batch.teacher_hidden_BTE.flatten(0, 1),
            self.teacher_head_VE,
            labels_N,
            hard_weight=self.hard_weight,
            soft_weight=self.soft_weight,
            temperature=self.temperature,
            chunk_tokens=self.chunk_tokens,
            zero_parts=bool(self._scheduled),
            **self.soft_options,
        )

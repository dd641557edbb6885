"""The published objective: half the text's cross-entropy, half the frozen teacher's."""

from torch import Tensor
from transformers import PreTrainedModel

from minima.batch import Batch
from minima.engine.objectives.objective import valid_tokens
from minima.engine.teacher.host import FrozenHost
from minima.losses import LossSum, linear_distillation_loss
from minima.models.causal_lm import head_weight, hidden_states


class Distillation:
    """Cross-entropy with the text and with a frozen teacher (arXiv 2311.07052, sec. 3).

    Args:
        teacher: runs in `prepare` and gives final hidden states; its logits exist in chunks inside the loss only.
        hard_weight: weight of the text's part.
        soft_weight: weight of the teacher's part. With 0 the teacher does not run.
        temperature: divides both models' logits in the teacher's part.
        chunk_tokens: tokens whose logits exist at one time.
    """

    window = 1

    def __init__(
        self,
        teacher: FrozenHost,
        *,
        hard_weight: float = 0.5,
        soft_weight: float = 0.5,
        temperature: float = 1.0,
        chunk_tokens: int = 1024,
    ) -> None:
        self.teacher = teacher
        self.hard_weight, self.soft_weight, self.temperature = hard_weight, soft_weight, temperature
        self.chunk_tokens = chunk_tokens

    def count(self, batch: Batch) -> Tensor:
        return valid_tokens(batch)

    def prepare(self, batches: list[Batch]) -> list[Batch]:
        return [batch._replace(teacher_hidden_BTE=self.teacher.hidden_states(batch)) for batch in batches]

    def __call__(self, model: PreTrainedModel, batch: Batch) -> LossSum:
        assert batch.teacher_hidden_BTE is not None, "prepare() runs first"
        hidden_ND = hidden_states(model, batch.input_ids_BT).flatten(0, 1)
        return linear_distillation_loss(
            hidden_ND,
            head_weight(model),
            batch.teacher_hidden_BTE.flatten(0, 1),
            self.teacher.head_VE,
            batch.labels_BT.flatten(),
            hard_weight=self.hard_weight,
            soft_weight=self.soft_weight,
            temperature=self.temperature,
            chunk_tokens=self.chunk_tokens,
        )

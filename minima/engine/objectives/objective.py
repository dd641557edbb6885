"""The interface between the training loop and what it optimises."""

from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from minima.batch import IGNORE_INDEX, Batch
from minima.losses import LossSum


class Objective(Protocol):
    """What one training run optimises: language modelling, distillation or preference.

    Attributes:
        window: number of micro-batches that `prepare` takes at once; 1 unless a frozen model serves several.
    """

    window: int

    def begin(self, step: int, total_steps: int) -> dict[str, float]:
        """Set what depends only on the step's number (the first is 0); runs before `prepare`. Returns log values."""
        ...

    def count(self, batch: Batch) -> Tensor:
        """The number of terms in this micro-batch's loss on this rank (valid tokens or pairs), as an int64 scalar."""
        ...

    def prepare(self, batches: list[Batch]) -> list[Batch]:
        """The micro-batches with a frozen model's outputs added. Runs before the student, never inside it."""
        ...

    def __call__(self, model: PreTrainedModel, batch: Batch) -> LossSum:
        """The loss of one micro-batch. Runs inside the student's forward, where ZeRO-3 gathers its parameters."""
        ...


def valid_tokens(batch: Batch) -> Tensor:
    """The number of tokens in the micro-batch that have a label, as an int64 scalar on its device."""
    return (batch.labels_BT != IGNORE_INDEX).sum()

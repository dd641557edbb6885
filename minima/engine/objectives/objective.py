"""The seam between the loop and what it optimises."""

from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from minima.batch import IGNORE_INDEX, Batch
from minima.losses import LossSum


class Objective(Protocol):
    """What one training run optimises: language modelling, distillation or preference.

    Attributes:
        window: micro-batches that `prepare` takes at once; 1 unless a frozen model says more.
    """

    window: int

    def begin(self, step: int, total_steps: int) -> dict[str, float]:
        """Set what depends on the step's number alone (the first is 0), before `prepare`; what the log says of it."""
        ...

    def count(self, batch: Batch) -> Tensor:
        """What the loss of this micro-batch is a sum over on this rank: valid tokens, as an int64 scalar."""
        ...

    def prepare(self, batches: list[Batch]) -> list[Batch]:
        """The same micro-batches with what a frozen model adds to them. Runs before the student, never inside it."""
        ...

    def __call__(self, model: PreTrainedModel, batch: Batch) -> LossSum:
        """The loss of one micro-batch. Runs inside the student's forward, where ZeRO-3 gathers its parameters."""
        ...


def valid_tokens(batch: Batch) -> Tensor:
    """Tokens of the micro-batch that have a label, as an int64 scalar on its device."""
    return (batch.labels_BT != IGNORE_INDEX).sum()

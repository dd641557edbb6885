"""What every loss returns: sums over tokens or pairs of answers, never means."""

from typing import NamedTuple

from torch import Tensor


class LossSum(NamedTuple):
    """A loss as a sum over valid tokens (for a preference: valid pairs of answers) of one micro-batch on one rank.

    A NamedTuple of tensors because ZeRO-3 has to see the tensors that leave the root module.

    Attributes:
        total: scalar float32, differentiable; the sum of the loss over them, in nats.
        count: scalar int64; how many are valid.
        parts: named scalar float32 sums over the same ones, detached, for the log.
    """

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # shadows tuple.count, which nobody wants of a loss
    parts: dict[str, Tensor]

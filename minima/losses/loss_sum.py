"""The return type of every loss: sums over tokens or pairs of answers, never means."""

from typing import NamedTuple

from torch import Tensor


class LossSum(NamedTuple):
    """A loss as a sum over valid tokens (for a preference: valid pairs of answers) of one micro-batch on one rank.

    A NamedTuple of tensors because ZeRO-3 must see the tensors that leave the root module.

    Attributes:
        total: scalar float32, differentiable; the summed loss in nats.
        count: scalar int64; the number of valid tokens or pairs.
        parts: named scalar float32 sums over the same tokens or pairs, detached, for the log.
    """

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # shadows tuple.count, which is of no use on a loss
    parts: dict[str, Tensor]

"""The batch, and the only place where labels are shifted."""

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100  # the label that PyTorch's and transformers' cross-entropies leave out


class Batch(NamedTuple):
    """One micro-batch on one rank. B sequences, T tokens, E teacher width.

    Attributes:
        input_ids_BT: int64.
        labels_BT: int64, already shifted: `labels_BT[b, t]` is the token that follows `input_ids_BT[b, t]`,
            or `IGNORE_INDEX` where none is to be predicted.
        teacher_hidden_BTE: what a frozen teacher's backbone gave for `input_ids_BT`, once it has run.
    """

    input_ids_BT: Tensor
    labels_BT: Tensor
    teacher_hidden_BTE: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`, copied without waiting where the memory is pinned."""
        hidden = self.teacher_hidden_BTE
        return Batch(
            self.input_ids_BT.to(device, non_blocking=True),
            self.labels_BT.to(device, non_blocking=True),
            None if hidden is None else hidden.to(device, non_blocking=True),
        )


def make_batch(tokens_BT: Tensor, valid_BT: Tensor | None = None) -> Batch:
    """Inputs and next-token labels of equally long sequences.

    The last position of a sequence predicts nothing, so a sequence of T tokens has at most T - 1 valid labels: the
    same tokens that `transformers` counts when it is given `labels=input_ids`.

    Args:
        tokens_BT: int64 token ids.
        valid_BT: bool; False where a token is padding or is not to be learnt. All True when it is not given.
    """
    labels_BT = torch.full_like(tokens_BT, IGNORE_INDEX)
    labels_BT[:, :-1] = tokens_BT[:, 1:]
    if valid_BT is not None:
        labels_BT[:, :-1].masked_fill_(~valid_BT[:, 1:], IGNORE_INDEX)
    return Batch(tokens_BT, labels_BT)

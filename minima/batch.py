"""The batch, and the only place where labels are shifted."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100  # the label that PyTorch's and transformers' cross-entropies ignore


class Batch(NamedTuple):
    """One micro-batch on one rank: B sequences, T tokens, E teacher width, S documents at most in a sequence."""

    input_ids_BT: Tensor  # int64
    # int64, already shifted: `labels_BT[b, t]` is the token that follows `input_ids_BT[b, t]`, or `IGNORE_INDEX` where
    # none is to be predicted
    labels_BT: Tensor
    # the output of a frozen teacher's backbone for `input_ids_BT`, once it has run
    teacher_hidden_BTE: Tensor | None = None
    # int64; index of each token's document within its sequence, from 0. No token attends to another document. None if
    # attention crosses documents, or if no document begins inside a sequence
    documents_BT: Tensor | None = None
    positions_BT: Tensor | None = None  # int64; each token's position in its document. None if `documents_BT` is None
    # float32 log-probability of each document's labels under the frozen reference of preference training
    reference_BS: Tensor | None = None
    num_documents: int = 0  # the largest number of documents in a sequence; 0 if they were not counted
    # index of each sequence in the run, which seeds noise; empty if nothing depends on it
    samples: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()  # index in the store of each sequence's block; empty like `samples`

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; the copy is asynchronous if the memory is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in pinned memory, from which a GPU can copy asynchronously."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        fields = self._asdict()
        changed: dict[str, Any] = {name: change(value) for name, value in fields.items() if isinstance(value, Tensor)}
        return self._replace(**changed)


def make_batch(tokens_BT: Tensor, valid_BT: Tensor | None = None, documents_BT: Tensor | None = None) -> Batch:
    """Make inputs and next-token labels from equally long sequences.

    The last position of a sequence predicts nothing, so a sequence of T tokens has at most T - 1 valid labels: the
    same tokens that `transformers` counts when given `labels=input_ids`. With documents this holds for each of them,
    so a packed sequence has the same labels as its documents on their own.

    Args:
        tokens_BT: int64 token ids.
        valid_BT: bool; False where a token is padding or is not to be learnt. All True if omitted.
        documents_BT: int64; see `Batch`.
    """
    labels_BT = torch.full_like(tokens_BT, IGNORE_INDEX)
    labels_BT[:, :-1] = tokens_BT[:, 1:]
    if valid_BT is not None:
        labels_BT[:, :-1].masked_fill_(~valid_BT[:, 1:], IGNORE_INDEX)
    if documents_BT is None:
        return Batch(tokens_BT, labels_BT)
    begins_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    labels_BT[:, :-1].masked_fill_(begins_BT[:, 1:], IGNORE_INDEX)
    places_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
    begun_BT = torch.where(begins_BT, places_BT, 0).cummax(dim=1).values
    return Batch(tokens_BT, labels_BT, documents_BT=documents_BT, positions_BT=places_BT - begun_BT)

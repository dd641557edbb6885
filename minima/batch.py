"""The batch, and the only place where labels are shifted."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100  # the label that PyTorch's and transformers' cross-entropies leave out


class Batch(NamedTuple):
    """One micro-batch on one rank. B sequences, T tokens, E teacher width, S documents of a sequence at most.

    Attributes:
        input_ids_BT: int64.
        labels_BT: int64, already shifted: `labels_BT[b, t]` is the token that follows `input_ids_BT[b, t]`,
            or `IGNORE_INDEX` where none is to be predicted.
        teacher_hidden_BTE: what a frozen teacher's backbone gave for `input_ids_BT`, once it has run.
        documents_BT: int64; which document of its sequence each token belongs to, counted from 0. No token sees
            another document. None where attention crosses documents, and where no document begins inside a sequence.
        positions_BT: int64; each token's place in its document. None with `documents_BT`.
        reference_BS: float32 log-probability of each document's labels under a preference's frozen reference.
        num_documents: documents of the sequence that has most of them; 0 where they were not counted.
        samples: the run's number of each sequence, which noise follows from; empty where nothing depends on it.
        blocks: the store's number of each sequence's block; empty like `samples`.
    """

    input_ids_BT: Tensor
    labels_BT: Tensor
    teacher_hidden_BTE: Tensor | None = None
    documents_BT: Tensor | None = None
    positions_BT: Tensor | None = None
    reference_BS: Tensor | None = None
    num_documents: int = 0
    samples: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`, copied without waiting where the memory is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in memory that a GPU copies from while the host goes on."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        fields = self._asdict()
        changed: dict[str, Any] = {name: change(value) for name, value in fields.items() if isinstance(value, Tensor)}
        return self._replace(**changed)


def make_batch(tokens_BT: Tensor, valid_BT: Tensor | None = None, documents_BT: Tensor | None = None) -> Batch:
    """Inputs and next-token labels of equally long sequences.

    The last position of a sequence predicts nothing, so a sequence of T tokens has at most T - 1 valid labels: the
    same tokens that `transformers` counts when it is given `labels=input_ids`. With documents that holds for each of
    them, so a packed sequence has the labels that its documents have alone.

    Args:
        tokens_BT: int64 token ids.
        valid_BT: bool; False where a token is padding or is not to be learnt. All True when it is not given.
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

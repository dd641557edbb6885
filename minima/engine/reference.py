"""The frozen reference of preference optimisation: log-probabilities of whole answers, computed now or beforehand.

Shapes: B sequences, T tokens, D width, V vocabulary, S documents per sequence (even), L blocks of a store.
"""

from typing import Protocol

import torch
from torch import Tensor

from minima.batch import IGNORE_INDEX, Batch
from minima.engine.teacher.host import FrozenHost
from minima.losses import document_sums, linear_token_log_probs


class Reference(Protocol):
    """Gives a frozen model's log-probabilities of a batch's answers."""

    def __call__(self, batch: Batch) -> Tensor:
        """Float32 sum of log p(label) over each document, [B, S] on the batch's device, without gradients."""
        ...


def num_answers(batch: Batch) -> int:
    """S of the batch: the most documents in any of its sequences, rounded up to an even number."""
    return batch.num_documents + batch.num_documents % 2


def answer_log_probs(hidden_BTD: Tensor, head_VD: Tensor, batch: Batch, chunk_tokens: int) -> Tensor:
    """Sum of log p(label) over each document, float32 [B, S], differentiable.

    Args:
        hidden_BTD: final hidden states of the batch.
        head_VD: the output head.
        batch: has labels on answers only.
        chunk_tokens: tokens whose logits are in memory at a time.
    """
    labels_BT = batch.labels_BT
    log_probs_N = linear_token_log_probs(
        hidden_BTD.flatten(0, 1), head_VD, labels_BT.flatten(), chunk_tokens=chunk_tokens
    )
    assert batch.documents_BT is not None, "blocks of preferences keep documents apart"
    return document_sums(log_probs_N.view_as(labels_BT), batch.documents_BT, num_answers(batch))


def answer_lengths(batch: Batch) -> Tensor:
    """Number of labels in each document, int64 [B, S]."""
    assert batch.documents_BT is not None, "blocks of preferences keep documents apart"
    return document_sums((batch.labels_BT != IGNORE_INDEX).long(), batch.documents_BT, num_answers(batch))


class HostReference:
    """A frozen model that runs for every batch; all ranks must make the same calls.

    Args:
        host: the model.
        chunk_tokens: tokens whose logits are in memory at a time.
    """

    def __init__(self, host: FrozenHost, chunk_tokens: int = 1024) -> None:
        self.host, self.chunk_tokens = host, chunk_tokens
        self.head_VE = host.head_VE  # gathered here, outside any forward

    def __call__(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return answer_log_probs(self.host.hidden_states(batch), self.head_VE, batch, self.chunk_tokens)


class KeptReference:
    """Values that a frozen model gave beforehand for the blocks of one store, from which every batch must come.

    Args:
        log_probs_LS: float32 on the CPU; sums of log p(label) over each document of each block.
    """

    def __init__(self, log_probs_LS: Tensor) -> None:
        self.log_probs_LS = log_probs_LS

    def __call__(self, batch: Batch) -> Tensor:
        assert len(batch.blocks) == len(batch.input_ids_BT), "a batch from a store names its blocks"
        rows_BS = self.log_probs_LS[:, : num_answers(batch)].index_select(0, torch.tensor(batch.blocks))
        device = batch.input_ids_BT.device
        return (rows_BS.pin_memory() if device.type == "cuda" else rows_BS).to(device, non_blocking=True)

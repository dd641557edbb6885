"""Held-out loss of one model, and its agreement with another, over every block exactly once.

Shapes: B sequences, T tokens, N = B x T, V vocabulary, D width, E the teacher's width.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from minima.batch import Batch
from minima.data.batches import read_batch
from minima.data.store import TokenStore
from minima.engine import distributed
from minima.errors import DataError, NotFinite, TokenizerMismatch
from minima.losses import linear_agreement, linear_cross_entropy

CHUNK_TOKENS = 512  # tokens whose logits exist at one time: 0.1 GB in float32 with a vocabulary of 50,000
_LARGEST_EXPONENT = 700.0  # exp(709.8) is the largest float64


class Host(Protocol):
    """The part of a frozen model that is used here; `engine.teacher.host.FrozenHost` implements it."""

    config: dict[str, Any]
    device: torch.device

    @property
    def head_VE(self) -> Tensor: ...

    def hidden_states(self, batch: Batch) -> Tensor: ...


@dataclass(frozen=True)
class HeldOut:
    """A model's scores on held-out blocks."""

    loss: float  # nats per predicted token
    perplexity: float  # exp(loss)
    # loss / (ln 2 x bytes per token), which is comparable across tokenizers. Bytes are those of the text in UTF-8 (for
    # conversations, of the replies), averaged over all trainable tokens of the store; the few that are never predicted
    # are assumed to cost as much as the rest. End tokens have no bytes, but predicting them costs bits, rightly so:
    # where a text ends is part of it
    bits_per_byte: float
    # number of predicted tokens. The first token of each block is given, not predicted; if documents are kept apart, so
    # is the first of each document
    tokens: int
    kl: float | None = None  # mean KL(teacher || model) per predicted token, in nats; None without a teacher
    # share of predicted tokens for which model and teacher agree on the most likely token; None without a teacher
    top1_agreement: float | None = None

    def as_dict(self) -> dict[str, float]:
        """The scores that were measured."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def rank_blocks(num_blocks: int, micro_batch: int, rank: int, world_size: int) -> Iterator[range]:
    """The range of blocks that one rank reads in each of its forward passes.

    Over all ranks every block occurs exactly once, and every rank gets the same number of ranges; the last ones are
    short or empty if the blocks do not divide evenly.
    """
    for start in range(0, num_blocks, micro_batch * world_size):
        first = min(start + rank * micro_batch, num_blocks)
        yield range(first, min(first + micro_batch, num_blocks))


def held_out_batch(store: TokenStore, blocks: range, micro_batch: int) -> Batch:
    """Some blocks as one full-size micro-batch, filled up with sequences without labels."""
    numbers = np.zeros(micro_batch, dtype=np.int64)
    numbers[: len(blocks)] = np.arange(blocks.start, blocks.stop)
    return read_batch(store, numbers, np.arange(micro_batch) < len(blocks))


def evaluate(
    host: Host,
    store: TokenStore,
    *,
    sequences: int | None = None,
    micro_batch_sequences: int = 4,
    teacher: Host | None = None,
    shared_rows: int | None = None,
    name: str = "model",
) -> HeldOut:
    """Score a model on the first `sequences` blocks of a store; every rank calls this and gets the same result.

    Apart from the order of float32 sums, the result depends neither on the number of ranks nor on the micro-batch.

    Args:
        sequences: at most this many blocks; all if not given.
        micro_batch_sequences: blocks per forward pass on one rank.
        teacher: a model with the same tokenizer to compare with.
        shared_rows: vocabulary rows to compare if one of the models has further rows that are padding.

    Raises:
        DataError: the store is empty.
        TokenizerMismatch: the store has token ids that the model does not know.
        VocabularyMismatch: the two models' vocabularies differ in size, and `shared_rows` is not given.
        NotFinite: the loss is infinite or NaN.
    """
    num_blocks = len(store) if sequences is None else min(sequences, len(store))
    check_store(host, store, num_blocks, name)
    sums = torch.zeros(4, dtype=torch.float64, device=host.device)  # loss, tokens, KL, tokens with the same top 1
    rank, world_size = distributed.rank(), distributed.world_size()
    with torch.no_grad():
        for blocks in rank_blocks(num_blocks, micro_batch_sequences, rank, world_size):
            batch = held_out_batch(store, blocks, micro_batch_sequences).to(host.device)
            sums += _score(host, teacher, batch, shared_rows)
    loss_sum, tokens, kl_sum, same = distributed.all_reduce_sum(sums).tolist()
    loss = loss_sum / tokens
    check_finite(loss, f"{name} has a held-out loss")
    return HeldOut(
        loss=loss,
        perplexity=math.exp(min(loss, _LARGEST_EXPONENT)),
        bits_per_byte=loss / (math.log(2) * store.bytes_per_token),
        tokens=round(tokens),
        kl=None if teacher is None else kl_sum / tokens,
        top1_agreement=None if teacher is None else same / tokens,
    )


def check_finite(loss: float, what: str) -> None:
    """Refuse a loss that is not finite; `what` begins the error's text."""
    if not math.isfinite(loss):
        raise NotFinite(
            f"{what} of {loss}",
            "a model whose loss is not finite is broken",
            "find the step in its training metrics at which they went wrong, and use an earlier checkpoint",
        )


def _score(host: Host, teacher: Host | None, batch: Batch, rows: int | None) -> Tensor:
    labels_N = batch.labels_BT.flatten()
    hidden_ND = host.hidden_states(batch).flatten(0, 1)
    loss = linear_cross_entropy(hidden_ND, host.head_VE, labels_N, chunk_tokens=CHUNK_TOKENS)
    sums = [loss.total, loss.count]
    if teacher is not None:
        teacher_NE = teacher.hidden_states(batch).flatten(0, 1)
        head_VD, head_VE = host.head_VE[:rows], teacher.head_VE[:rows]
        agreement = linear_agreement(hidden_ND, head_VD, teacher_NE, head_VE, labels_N, chunk_tokens=CHUNK_TOKENS)
        sums += [agreement["kl"], agreement["same_top1"]]
    sums += [torch.zeros_like(loss.total)] * (4 - len(sums))
    return torch.stack([value.double() for value in sums])


def check_store(host: Host, store: TokenStore, num_blocks: int, name: str) -> None:
    """Refuse held-out blocks that a model cannot be scored on.

    Raises:
        DataError: there are no blocks.
        TokenizerMismatch: the store has token ids that the model does not know.
    """
    if num_blocks == 0:
        raise DataError(
            f"{store.folder} holds no block of {store.sequence_length} tokens",
            "there are no tokens to compute a loss over",
            "raise held_out_fraction of the build_data stage, or shorten its sequence_length",
        )
    vocabulary = host.config["vocab_size"]
    if store.vocabulary_size > vocabulary:
        raise TokenizerMismatch(
            f"{store.folder} has {store.vocabulary_size} token ids, but {name} knows {vocabulary}",
            "the model has no embedding for the ids beyond its own",
            "build the data with this model's tokenizer",
        )

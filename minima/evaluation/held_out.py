"""Held-out loss of one model, and how closely it follows another, over every block exactly once.

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

CHUNK_TOKENS = 512  # tokens whose logits exist at one time: 0.1 GB of float32 at a vocabulary of 50,000
_LARGEST_EXPONENT = 700.0  # exp(709.8) is the largest float64


class Host(Protocol):
    """What is asked of a model here; `engine.teacher.host.FrozenHost` is one."""

    config: dict[str, Any]
    device: torch.device

    @property
    def head_VE(self) -> Tensor: ...

    def hidden_states(self, batch: Batch) -> Tensor: ...


@dataclass(frozen=True)
class HeldOut:
    """What a model scores on held-out blocks.

    Attributes:
        loss: nats per predicted token.
        perplexity: exp(loss).
        bits_per_byte: loss / (ln 2 x bytes per token), which compares models with different tokenizers. Bytes are
            those of the text in UTF-8 (of conversations, of the replies), averaged over all tokens of the store that
            are to be learnt: what is given and not predicted counts as costly as the rest. End tokens have no bytes,
            but their prediction costs bits, as it should: where a text ends is part of it.
        tokens: predicted tokens. The first of each block is given, and where documents are kept apart the first of
            each document.
        kl: mean KL(teacher || model) per predicted token, in nats; none without a teacher.
        top1_agreement: share of predicted tokens whose most likely token is the teacher's, too; none without one.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    kl: float | None = None
    top1_agreement: float | None = None

    def as_dict(self) -> dict[str, float]:
        """The scores that were measured."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def rank_blocks(num_blocks: int, micro_batch: int, rank: int, world_size: int) -> Iterator[range]:
    """Which blocks one rank reads in each of its calls.

    Over all ranks every block comes exactly once, and every rank makes the same number of calls; late ranges are
    short or empty where the blocks do not divide.
    """
    for start in range(0, num_blocks, micro_batch * world_size):
        first = min(start + rank * micro_batch, num_blocks)
        yield range(first, min(first + micro_batch, num_blocks))


def held_out_batch(store: TokenStore, blocks: range, micro_batch: int) -> Batch:
    """Some blocks as one micro-batch of full size; what is missing is sequences without a label."""
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

    Neither the number of ranks nor the micro-batch changes the result, but for the order of float32 sums.

    Args:
        host: the model.
        store: held-out blocks.
        sequences: at most this many blocks; all when not given.
        micro_batch_sequences: blocks of one forward pass on one rank.
        teacher: a model over the same tokens to compare with.
        shared_rows: rows of both vocabularies that are compared, where one of them has more, of no token.
        name: what errors call the model.

    Raises:
        DataError: the store is empty.
        TokenizerMismatch: the store has token ids that the model does not know.
        VocabularyMismatch: the two models' vocabularies differ in size, and `shared_rows` is not given.
        NotFinite: the loss is infinite or not a number.
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
    if not math.isfinite(loss):
        raise NotFinite(
            f"{name} has a held-out loss of {loss}",
            "a model whose loss is not a number predicts nothing",
            "look at its training metrics for the step at which they went wrong, and take an earlier checkpoint",
        )
    return HeldOut(
        loss=loss,
        perplexity=math.exp(min(loss, _LARGEST_EXPONENT)),
        bits_per_byte=loss / (math.log(2) * store.bytes_per_token),
        tokens=round(tokens),
        kl=None if teacher is None else kl_sum / tokens,
        top1_agreement=None if teacher is None else same / tokens,
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

    Args:
        host: the model.
        store: where the blocks lie.
        num_blocks: how many are to be scored.
        name: what errors call the model.

    Raises:
        DataError: there is no block.
        TokenizerMismatch: the store has token ids that the model does not know.
    """
    if num_blocks == 0:
        raise DataError(
            f"{store.folder} holds no block of {store.sequence_length} tokens",
            "a loss over no tokens says nothing",
            "raise held_out_fraction of the build_data stage, or shorten its sequence_length",
        )
    vocabulary = host.config["vocab_size"]
    if store.vocabulary_size > vocabulary:
        raise TokenizerMismatch(
            f"{store.folder} has {store.vocabulary_size} token ids, {name} knows {vocabulary}",
            "ids beyond the embedding have no meaning for the model",
            "build the data with this model's tokenizer",
        )

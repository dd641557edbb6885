"""Held-out scores against transformers' own loss, and against dense float64 arithmetic for agreement."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minima.engine import distributed
from minima.errors import DataError, NotFinite, TokenizerMismatch, VocabularyMismatch
from minima.evaluation.held_out import evaluate, held_out_batch, rank_blocks
from minima.models.causal_lm import head_weight, hidden_states, load_plain
from minima.models.shape import ModelShape
from minima.models.weights import RandomSource
from tests.fakes import TextStore

SHAPE = ModelShape(vocabulary_size=48, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2)


class PlainHost:
    """One stock model in this process, with a host's face."""

    device = torch.device("cpu")

    def __init__(self, seed: int, shape: ModelShape = SHAPE) -> None:
        self.config = shape.to_config() | {"initializer_range": 0.3}
        self.model = load_plain(RandomSource(self.config, seed))
        self.head_VE = head_weight(self.model).detach()

    def hidden_states(self, batch):
        return hidden_states(self.model, batch)


class Blocks(TextStore):
    """A store's face over tokens in memory."""

    folder, sequence_length = "blocks", 12

    def __init__(self, num_blocks: int = 7) -> None:
        self.tokens_BT = np.random.default_rng(0).integers(0, 48, (num_blocks, 12))

    def __len__(self) -> int:
        return len(self.tokens_BT)

    def blocks(self, indices):
        return self.tokens_BT[indices]


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda tensor: tensor)


def test_loss_is_what_transformers_says():
    host, store = PlainHost(3), Blocks()
    scores = evaluate(host, store, micro_batch_sequences=3)
    tokens_BT = torch.from_numpy(store.tokens_BT)
    with torch.no_grad():
        expected = host.model(input_ids=tokens_BT, labels=tokens_BT).loss.item()
    assert scores.loss == pytest.approx(expected, rel=1e-6)
    assert scores.tokens == 7 * 11  # the first token of a block is not predicted
    assert scores.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert scores.bits_per_byte == pytest.approx(expected / math.log(2) / 4.0, rel=1e-6)
    assert scores.kl is None
    assert "kl" not in scores.as_dict()


def test_agreement_is_the_dense_one():
    student, teacher, store = PlainHost(3), PlainHost(5), Blocks()
    scores = evaluate(student, store, teacher=teacher, micro_batch_sequences=2)
    tokens_BT = torch.from_numpy(store.tokens_BT)
    with torch.no_grad():
        log_p = student.model(tokens_BT).logits[:, :-1].double().log_softmax(-1)
        log_t = teacher.model(tokens_BT).logits[:, :-1].double().log_softmax(-1)
    assert scores.kl == pytest.approx((log_t.exp() * (log_t - log_p)).sum(-1).mean().item(), rel=1e-5)
    same = (log_p.argmax(-1) == log_t.argmax(-1)).double().mean().item()
    assert scores.top1_agreement == pytest.approx(same)
    assert 0 < same < 1


def test_a_model_agrees_with_itself():
    host = PlainHost(3)
    scores = evaluate(host, Blocks(), teacher=host)
    assert scores.kl == pytest.approx(0.0, abs=1e-7)
    assert scores.top1_agreement == 1.0


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_ranks_and_micro_batch_do_not_change_the_result(monkeypatch, world_size, micro_batch):
    student, teacher, store = PlainHost(3), PlainHost(5), Blocks()
    expected = evaluate(student, store, teacher=teacher, micro_batch_sequences=7)
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)
    shares: list[torch.Tensor] = []
    for rank in range(world_size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "all_reduce_sum", lambda sums: shares.append(sums) or torch.ones(4))
        evaluate(student, store, teacher=teacher, micro_batch_sequences=micro_batch)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda _: torch.stack(shares).sum(0))
    result = evaluate(student, store, teacher=teacher, micro_batch_sequences=micro_batch)
    assert result.tokens == expected.tokens
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert result.kl == pytest.approx(expected.kl, rel=1e-6)
    assert result.top1_agreement == expected.top1_agreement


@given(blocks=st.integers(1, 200), micro_batch=st.integers(1, 9), world_size=st.integers(1, 9))
def test_every_block_comes_once_and_all_ranks_call_alike(blocks, micro_batch, world_size):
    plans = [list(rank_blocks(blocks, micro_batch, rank, world_size)) for rank in range(world_size)]
    assert sorted(block for plan in plans for piece in plan for block in piece) == list(range(blocks))
    assert len({len(plan) for plan in plans}) == 1
    assert all(len(piece) <= micro_batch for plan in plans for piece in plan)


def test_missing_sequences_predict_nothing():
    batch = held_out_batch(Blocks(), range(6, 7), 3)
    assert batch.input_ids_BT.shape == (3, 12)
    assert (batch.labels_BT[0, :-1] == batch.input_ids_BT[0, 1:]).all()
    assert (batch.labels_BT[1:] == -100).all()


def test_only_the_first_blocks_when_asked():
    host, store = PlainHost(3), Blocks()
    first = Blocks()
    first.tokens_BT = store.tokens_BT[:2]
    assert evaluate(host, store, sequences=2) == evaluate(host, first)


def test_vocabularies_of_two_sizes_are_refused():
    larger = PlainHost(1, SHAPE.model_copy(update={"vocabulary_size": 50}))
    with pytest.raises(VocabularyMismatch, match=r"48 tokens.*50"):
        evaluate(PlainHost(3), Blocks(), teacher=larger)


def test_ids_that_the_model_does_not_know_are_refused():
    with pytest.raises(TokenizerMismatch, match="48 token ids"):
        evaluate(PlainHost(1, SHAPE.model_copy(update={"vocabulary_size": 40})), Blocks())


def test_an_empty_store_is_refused():
    with pytest.raises(DataError, match="holds no block"):
        evaluate(PlainHost(3), Blocks(0))


def test_a_loss_that_is_no_number_names_the_model():
    host = PlainHost(3)
    host.head_VE = host.head_VE * math.nan
    with pytest.raises(NotFinite, match="broken"):
        evaluate(host, Blocks(), name="broken")


def test_rows_of_no_token_are_left_out_of_the_comparison():
    """A teacher whose embedding is padded to 50 rows is compared over the 48 tokens that both models have."""
    student, teacher, store = PlainHost(3), PlainHost(5, SHAPE.model_copy(update={"vocabulary_size": 50})), Blocks()
    tokens_BT = torch.from_numpy(store.tokens_BT)
    for one, other in ((student, teacher), (teacher, student)):
        scores = evaluate(one, store, teacher=other, shared_rows=48)
        with torch.no_grad():
            loss = one.model(input_ids=tokens_BT, labels=tokens_BT).loss.item()
            log_p, log_t = (host.model(tokens_BT).logits[:, :-1, :48].double().log_softmax(-1) for host in (one, other))
        assert scores.kl == pytest.approx((log_t.exp() * (log_t - log_p)).sum(-1).mean().item(), rel=1e-5)
        same = (log_p.argmax(-1) == log_t.argmax(-1)).double().mean().item()
        assert scores.top1_agreement == pytest.approx(same)
        assert scores.loss == pytest.approx(loss, rel=1e-6), "the loss is over all rows of its own model"

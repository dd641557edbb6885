"""The preference objective on a real model: log 2 at the start, every pair as if it were alone, kept values."""

import math

import pytest
import torch

from minima.batch import IGNORE_INDEX
from minima.data.batches import read_batch
from minima.engine.objectives.preference import Preference
from minima.engine.reference import HostReference, KeptReference
from minima.models.shape import ModelShape
from minima.models.weights import RandomSource
from tests.pairs import VOCABULARY, PlainHost, pair_losses, random_pairs, write_pairs

SHAPE = ModelShape(
    vocabulary_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_key_value_heads=2,
    tied=True,
)  # fmt: skip
KINDS = [
    {"beta": 0.3},
    {"beta": 0.3, "label_smoothing": 0.2, "length_normalised": True},
    {"beta": 0.5, "loss": "ipo", "length_normalised": True},
]


def host(seed: int) -> PlainHost:
    return PlainHost(RandomSource(SHAPE.to_config() | {"initializer_range": 0.3}, seed))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "train", 5)


def batch_of(store, *blocks: int, valid=None):
    return read_batch(store, torch.tensor(blocks).numpy(), valid)


def run(objective, model, batch):
    assert (count := objective.count(batch)).dtype == torch.int64
    [prepared] = objective.prepare([batch])
    loss = objective(model, prepared)
    assert loss.count == count
    return loss


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_that_is_its_reference_loses_log_2(store, kind):
    policy = host(1)
    loss = run(Preference(HostReference(host(1)), **kind), policy.model, batch_of(store, 0, 1, 2))
    wanted = 1 / (2 * kind["beta"]) ** 2 if kind.get("loss") == "ipo" else math.log(2)
    assert loss.total.item() / loss.count.item() == pytest.approx(wanted, rel=1e-6)
    assert loss.parts["accuracy"] == 0 and abs(loss.parts["margin"]) < 1e-6
    loss.total.backward()
    gradients = [weight.grad for weight in policy.model.parameters()]
    assert any(gradient.any() for gradient in gradients), "it learns from there"


@pytest.mark.parametrize("kind", KINDS)
def test_packed_pairs_are_what_they_are_alone(store, kind):
    policy, reference, alone = host(1), host(2), host(1)
    loss = run(Preference(HostReference(reference), chunk_tokens=7, **kind), policy.model, batch_of(store, 0, 1, 2, 3))
    loss.total.backward()
    losses = list(pair_losses(alone.model.double(), reference.model.double(), [0, 1, 2, 3], 0, **kind))
    assert loss.count == len(losses) == 7
    torch.stack(losses).sum().backward()
    torch.testing.assert_close(loss.total.double(), torch.stack(losses).sum(), rtol=2e-6, atol=1e-6)
    for (name, weight), other in zip(policy.model.named_parameters(), alone.model.parameters(), strict=True):
        error = (weight.grad.double() - other.grad).abs().max() / other.grad.abs().max()
        assert error < 1e-5, (name, error)


def test_a_step_is_the_same_however_it_is_cut_and_masked_blocks_count_nothing(store):
    policy, objective = host(1), Preference(HostReference(host(2)), beta=0.3)
    whole = run(objective, policy.model, batch_of(store, 0, 1, 2, 3, 4))
    pieces = [run(objective, policy.model, batch_of(store, *blocks)) for blocks in ((0,), (1, 2), (3, 4))]
    assert whole.count == sum(piece.count for piece in pieces)
    torch.testing.assert_close(whole.total, sum(piece.total for piece in pieces), rtol=1e-6, atol=1e-6)
    masked = run(objective, policy.model, batch_of(store, 0, 2, 1, valid=[True, False, True]))
    kept = run(objective, policy.model, batch_of(store, 0, 1))
    torch.testing.assert_close(masked.total, kept.total, rtol=1e-6, atol=1e-6)
    assert masked.count == kept.count == 3
    empty = run(objective, policy.model, batch_of(store, 0, 1, valid=[False, False]))
    empty.total.backward()
    assert empty.count == empty.total == 0 and not any(weight.grad.any() for weight in policy.model.parameters())


def test_the_padding_document_is_no_answer(store):
    batch = batch_of(store, 0)
    assert batch.num_documents == 3 and len(random_pairs(0)) == 1, "one pair, and what fills the block"
    assert (batch.labels_BT[0, batch.documents_BT[0] == 2] == IGNORE_INDEX).all()
    assert HostReference(host(2))(batch).shape == (1, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_kept_values_give_the_same_loss_without_the_model(store, kind):
    policy, live = host(1), HostReference(host(2))
    kept = KeptReference(live(batch_of(store, 0, 1, 2, 3, 4)))
    for blocks in ((3, 1), (0,), (2, 4, 2)):
        batch = batch_of(store, *blocks)
        first, second = (run(Preference(reference, **kind), policy.model, batch) for reference in (live, kept))
        torch.testing.assert_close(first.total, second.total, rtol=1e-6, atol=1e-6)
        assert first.count == second.count

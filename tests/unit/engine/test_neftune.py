"""NEFTune's noise: its scale, and that it follows from the sequence's number alone."""

import torch

from minima.batch import make_batch
from minima.engine.objectives.language_modelling import LanguageModelling
from minima.engine.objectives.neftune import noisy_embeddings
from minima.models.causal_lm import load_plain
from minima.models.shape import ModelShape
from minima.models.weights import RandomSource

SHAPE = ModelShape(vocabulary_size=50, hidden_size=64, intermediate_size=48, num_layers=1, num_heads=2)
MODEL = load_plain(RandomSource(SHAPE.to_config(), seed=1))
DOCUMENTS_BT = torch.tensor([[0] * 40 + [1] * 10 + [2] * 14, [0] * 64])
BATCH = make_batch(torch.arange(128).view(2, 64) % 50, documents_BT=DOCUMENTS_BT)._replace(samples=(4, 9))


def noise(batch, alpha=5.0, seed=3):
    return noisy_embeddings(MODEL, batch, alpha, seed) - MODEL.get_input_embeddings()(batch.input_ids_BT)


def test_the_scale_is_alpha_over_the_root_of_a_documents_size():
    found = noise(BATCH)
    for row, columns, length in ((0, slice(0, 40), 40), (0, slice(40, 50), 10), (1, slice(0, 64), 64)):
        limit = 5.0 / (length * 64) ** 0.5
        part = found[row, columns]
        assert part.abs().max() <= limit * 1.001
        torch.testing.assert_close(part.std().item(), limit / 3**0.5, rtol=0.1, atol=0)  # of a uniform distribution
        assert abs(part.mean().item()) < 0.15 * limit


def test_it_follows_from_seed_and_sample_and_not_from_the_micro_batch():
    whole = noise(BATCH)
    second = BATCH._replace(input_ids_BT=BATCH.input_ids_BT[1:], documents_BT=BATCH.documents_BT[1:], samples=(9,))
    assert noise(second).equal(whole[1:])
    assert not noise(second._replace(samples=(10,))).allclose(whole[1:])
    assert not noise(BATCH, seed=4).allclose(whole)


def test_the_objective_uses_it_only_when_asked():
    losses = [LanguageModelling(neftune_alpha=alpha, seed=3)(MODEL, BATCH).total.item() for alpha in (0.0, 0.0, 5.0)]
    assert losses[0] == losses[1] != losses[2]

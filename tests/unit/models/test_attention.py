"""The same bits as the stock attention, without a question to the host."""

import pytest
import torch

from minima.batch import make_batch
from minima.models.attention import CAUSAL, WINDOWED
from minima.models.causal_lm import hidden_states, load_plain
from minima.models.shape import FAMILIES, ModelShape
from minima.models.stock import build_empty
from minima.models.weights import RandomSource
from tests.fakes import HostReads

SMALL = {"vocabulary_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4}
TOKENS_BT = torch.arange(24).view(2, 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bits_are_the_stock_ones_and_the_host_is_not_asked(family):
    config = ModelShape(family=family, **SMALL).to_config() | {"initializer_range": 0.3, "sliding_window": None}
    model = load_plain(RandomSource(config, seed=1))
    assert model.config._attn_implementation == CAUSAL
    with HostReads() as reads:
        loss = hidden_states(model, make_batch(TOKENS_BT)).square().sum()
        loss.backward()
    assert reads.count == 0
    found = hidden_states(model, make_batch(TOKENS_BT))
    model.set_attn_implementation("sdpa")
    with HostReads() as stock_reads:
        wanted = hidden_states(model, make_batch(TOKENS_BT))
    assert found.equal(wanted)
    assert stock_reads.count > 0, "transformers no longer asks: this attention is not needed any more"


def test_a_sliding_window_keeps_its_mask():
    config = ModelShape(family="mistral", **SMALL).to_config() | {"sliding_window": 4, "initializer_range": 0.3}
    assert build_empty(config).config._attn_implementation == WINDOWED
    windowed, whole = (load_plain(RandomSource(config | {"sliding_window": size}, seed=1)) for size in (4, None))
    outputs = [hidden_states(model, make_batch(TOKENS_BT)) for model in (windowed, whole)]
    windowed.set_attn_implementation("sdpa")
    assert outputs[0].equal(hidden_states(windowed, make_batch(TOKENS_BT)))
    assert outputs[0][:, :4].allclose(outputs[1][:, :4], atol=1e-6) and not outputs[0].allclose(outputs[1], atol=1e-3)

"""The same bits as the stock attention, without a question to the host."""

from types import SimpleNamespace

import pytest
import torch

from minima.batch import make_batch
from minima.models import attention as attention_module
from minima.models.attention import CAUSAL, WINDOWED, attention
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


class GroupedLayer(torch.nn.Module):
    num_key_value_groups, is_causal = 3, True


@pytest.mark.parametrize(
    ("device", "dtype", "head_size", "repeated"),
    [
        ("cuda", torch.float32, 64, True),
        ("cuda", torch.float32, 320, False),  # the stock function repeats them itself
        ("cuda", torch.bfloat16, 64, False),
        ("cpu", torch.float32, 64, False),
    ],
)
def test_float32_on_a_gpu_has_no_kernel_for_grouped_queries_but_the_one_that_holds_all_scores(
    device, dtype, head_size, repeated
):
    queries = SimpleNamespace(device=torch.device(device), dtype=dtype)
    assert attention_module._holds_all_scores(queries, SimpleNamespace(shape=(2, 2, 8, head_size))) is repeated


@pytest.mark.parametrize("masked", [False, True])
def test_keys_and_values_are_repeated_once_and_change_no_number(monkeypatch, masked):
    given, stock = [], attention_module.sdpa_attention_forward

    def watch(module, query, key, value, *others, **kwargs):
        given.append((key.shape[1], value.shape[1]))
        return stock(module, query, key, value, *others, **kwargs)

    monkeypatch.setattr(attention_module, "sdpa_attention_forward", watch)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, heads, 8, 16, generator=generator, requires_grad=True) for heads in (6, 2, 2)]
    mask = torch.full((8, 8), -torch.inf).triu(1).expand(2, 1, 8, 8) if masked else None
    results = []
    for repeated in (False, True):
        monkeypatch.setattr(attention_module, "_holds_all_scores", lambda *_, repeated=repeated: repeated)
        output = attention(GroupedLayer(), *inputs, mask, scaling=0.3)[0]
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    torch.testing.assert_close(*results)
    assert given == [(2, 2), (2, 2) if masked else (6, 6)]  # with a mask the stock function repeats them itself

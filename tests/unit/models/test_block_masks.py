"""Blocks for flex attention see what the dense mask sees, and ask nothing of the host; kernels run on a GPU only."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import create_block_mask

from minima.batch import make_batch
from minima.models import attention as attention_module
from minima.models.attention import CAUSAL, WINDOWED, attention, document_blocks, document_mask
from minima.models.causal_lm import hidden_states, load_plain
from minima.models.compiling import compile_layers
from minima.models.shape import ModelShape
from minima.models.stock import stock_config
from minima.models.weights import RandomSource
from tests.fakes import HostReads
from tests.probe import probe_loss


def documents(num_tokens: int, begins: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    begins_BT = torch.zeros(len(begins), num_tokens, dtype=torch.int64)
    for row, places in enumerate(begins):
        begins_BT[row, list(places)] = 1
    return begins_BT.cumsum(1)


def listed(counts_B1N: torch.Tensor, columns_B1NN: torch.Tensor) -> torch.Tensor:
    """Bool [B, N, N]: the blocks that a mask's lists name; a row's columns are all of them, the named ones first."""
    named_B1NN = torch.arange(columns_B1NN.shape[-1]) < counts_B1N.unsqueeze(-1)
    return torch.zeros_like(named_B1NN).scatter(-1, columns_B1NN.long(), named_B1NN)[:, 0]


BEGINS = ((), (5, 300), (128, 256, 300, 301), (1, 127, 383))
LENGTHS = (512, 400)


@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize("window", [None, 1, 100, 129, 256])
def test_blocks_are_those_of_the_dense_mask(num_tokens, window):
    documents_BT = documents(num_tokens, BEGINS)
    dense_BTT = document_mask(documents_BT, window)[:, 0]
    with HostReads() as reads:
        mask = document_blocks(documents_BT, window)
    assert reads.count == 0
    filled = -num_tokens % 128
    nothing, anything = (
        torch.nn.functional.pad(dense_BTT, (0, filled, 0, filled), value=behind)
        .unflatten(2, (-1, 128))
        .unflatten(1, (-1, 128))
        for behind in (False, True)  # kernels look at no row and no column behind the last token
    )
    visible = nothing.any(4).any(2)
    partial, full = (
        listed(counts, columns)
        for counts, columns in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    )
    assert not (partial & full).any()
    assert (visible <= (partial | full)).all(), "a block that is seen is left out"
    assert (full <= anything.all(4).all(2)).all(), "a block with walls would be taken whole"
    stock = create_block_mask(mask.mask_mod, len(BEGINS), None, num_tokens, num_tokens, device="cpu")
    assert (partial | full).sum() == stock.kv_num_blocks.sum() + stock.full_kv_num_blocks.sum(), "no block too many"
    # The sides that the backward pass reads are the same blocks.
    assert listed(mask.q_num_blocks, mask.q_indices).equal(partial.mT)
    rows, places = torch.arange(len(BEGINS))[:, None, None], torch.arange(num_tokens)
    assert mask.mask_mod(rows, rows, places[:, None], places[None, :]).equal(dense_BTT)


@pytest.fixture
def uncompiled(monkeypatch):
    """Flex attention as plain tensor operations, with a backward pass on the CPU, which its kernels have not."""
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(attention_module, "compiled_flex_attention", lambda: flex.flex_attention)


class Layer(torch.nn.Module):
    num_key_value_groups, is_causal = 3, True


@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize("window", [None, 100])
def test_values_and_gradients_are_those_of_the_dense_mask(uncompiled, num_tokens, window):
    generator = torch.Generator().manual_seed(0)
    documents_BT = documents(num_tokens, BEGINS)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    inputs = [normal(4, heads, num_tokens, 16) for heads in (6, 2, 2)]
    above = normal(4, num_tokens, 6, 16).detach()
    results = []
    for mask in (document_blocks(documents_BT, window), document_mask(documents_BT, window)):
        output = attention(Layer(), *inputs, mask, scaling=0.2, dropout=0.0)[0]
        results.append((output, *torch.autograd.grad(output, inputs, above)))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)


SMALL = {"vocabulary_size": 50, "hidden_size": 64, "intermediate_size": 48, "num_layers": 2, "num_heads": 4}


def as_on_a_gpu(config, documents_BT, dtype):
    """`attention_mask`, told that the documents are on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "document_blocks", lambda _, window: document_blocks(documents_BT, window))
        patch.setattr(attention_module, "triton_trouble", lambda: None)
        elsewhere = SimpleNamespace(device=torch.device("cuda"), shape=documents_BT.shape)
        return attention_module.attention_mask(config, elsewhere, dtype)


def test_small_heads_and_gpt2_keep_the_bias_on_a_gpu():
    for family, num_heads, blocks in (("llama", 4, True), ("llama", 8, False), ("gpt2", 4, False)):
        config = stock_config(ModelShape(family=family, **(SMALL | {"num_heads": num_heads})).to_config())
        assert attention_module._takes_blocks(config, 128) is blocks, (family, num_heads)
        assert not attention_module._takes_blocks(config, 127)  # where some grouped queries find no kernel


def test_a_gpu_where_triton_starts_no_kernel_gets_the_bias(monkeypatch):
    documents_BT = documents(128, ((5,),))
    elsewhere = SimpleNamespace(device=torch.device("cuda"), shape=documents_BT.shape)
    dense_B1TT = document_mask(documents_BT)
    monkeypatch.setattr(attention_module, "document_mask", lambda *_: dense_B1TT)
    monkeypatch.setattr(attention_module, "triton_trouble", lambda: "no C compiler")
    config = stock_config(ModelShape(**SMALL).to_config())
    assert attention_module.attention_mask(config, elsewhere, torch.float32).equal(
        torch.where(dense_B1TT, 0.0, -torch.inf)
    )


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("gpt_neox", {}),
        ("mistral", {"sliding_window": 100}),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 1}),
    ],
)
def test_a_model_given_blocks_is_the_model_given_the_bias(monkeypatch, uncompiled, family, config):
    shape = ModelShape(family=family, **SMALL, num_key_value_heads=4 if family == "gpt_neox" else 2, max_positions=400)
    model = load_plain(RandomSource(shape.to_config() | {"initializer_range": 0.3} | config, seed=1))
    assert model.config._attn_implementation == (WINDOWED if "sliding_window" in config else CAUSAL)
    tokens_BT = torch.randint(0, 50, (4, 400), generator=torch.Generator().manual_seed(0))
    batch = make_batch(tokens_BT, documents_BT=documents(400, BEGINS))
    losses, gradients = [], []

    def run() -> None:
        model.zero_grad()
        losses.append(probe_loss(hidden_states(model, batch)))
        losses[-1].backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])

    run()
    monkeypatch.setattr("minima.models.causal_lm.attention_mask", as_on_a_gpu)
    monkeypatch.setattr(attention_module, "document_mask", None)  # nobody makes the dense one from here on
    run()
    torch.testing.assert_close(*losses)
    for found, wanted in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_compiled_layer_takes_any_batch_of_blocks_without_a_break_or_another_graph():
    torch._dynamo.reset()
    shape = ModelShape(**SMALL, num_key_value_heads=2, max_positions=256)
    model = load_plain(RandomSource(shape.to_config() | {"initializer_range": 0.3}, seed=1))
    plain = load_plain(RandomSource(shape.to_config() | {"initializer_range": 0.3}, seed=1))
    compile_layers(model, "eager")
    torch._dynamo.utils.counters.clear()
    tokens_BT = torch.randint(0, 50, (2, 256), generator=torch.Generator().manual_seed(0))
    for begins in (((5,), (128, 200)), ((100, 130, 250), ()), ((1,), (2,))):
        documents_BT = documents(256, begins)
        places_BT = make_batch(tokens_BT, documents_BT=documents_BT).positions_BT
        with torch.no_grad():
            found, wanted = (
                instance.base_model(
                    input_ids=tokens_BT, attention_mask=mask, position_ids=places_BT, use_cache=False
                ).last_hidden_state
                for instance, mask in (
                    (model, document_blocks(documents_BT)),
                    (plain, torch.where(document_mask(documents_BT), 0.0, -torch.inf)),
                )
            )
        torch.testing.assert_close(found, wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_the_compiled_attention_is_the_dense_mask_for_any_batch_from_one_graph():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    generator = torch.Generator().manual_seed(0)
    for begins in (((5, 300), (128,)), ((77,), ()), ((1, 2), (256, 300))):
        documents_BT = documents(400, begins)
        query, key, value = (torch.randn(2, heads, 400, 16, generator=generator) for heads in (6, 2, 2))
        found = attention(Layer(), query, key, value, document_blocks(documents_BT), scaling=0.2)[0]
        wanted = attention(Layer(), query, key, value, document_mask(documents_BT), scaling=0.2)[0]
        torch.testing.assert_close(found, wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

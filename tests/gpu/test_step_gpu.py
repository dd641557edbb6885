"""What only a GPU shows of a step: flex attention's kernels, their cost, liger-kernel's, and compiled layers."""

import itertools
import statistics
from collections.abc import Callable

import pytest
import torch

from minima.batch import Batch, make_batch
from minima.models.attention import attention, document_blocks, document_mask
from minima.models.causal_lm import hidden_states, load_plain
from minima.models.compiling import compile_layers, recompute
from minima.models.kernels import use_liger
from minima.models.shape import ModelShape
from minima.models.weights import RandomSource
from tests.distributed.ranks import run_scenarios
from tests.distributed.test_engine import expect_same
from tests.probe import probe_loss

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
SMALL = {"vocabulary_size": 97, "hidden_size": 128, "intermediate_size": 192, "num_layers": 3, "num_heads": 4}


def model_of(family: str, dtype: torch.dtype, **config):
    shape = ModelShape(family=family, **SMALL, num_key_value_heads=4 if family == "gpt_neox" else 2, max_positions=512)
    return load_plain(RandomSource(shape.to_config() | {"initializer_range": 0.2} | config, seed=1), dtype).to(CUDA)


def packed_batch(num_tokens: int, num_documents: int, num_sequences: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(0, 97, (num_sequences, num_tokens), generator=generator)
    begins_BT = torch.zeros(num_sequences, num_tokens, dtype=torch.int64)
    for row in range(num_sequences):
        begins_BT[row, torch.randperm(num_tokens - 1, generator=generator)[: num_documents - 1] + 1] = 1
    return make_batch(tokens_BT, documents_BT=begins_BT.cumsum(1)).to(CUDA)


def gradients(model, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    hidden = hidden_states(model, batch)
    probe_loss(hidden).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"hidden": hidden.detach(), **found}


def expect_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, reference in wanted.items():
        difference = (found[name].double() - reference.double()).abs().max() / reference.double().abs().max()
        assert difference < tolerance, (name, difference)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("num_tokens", [512, 400])
@pytest.mark.parametrize("window", [None, 100])
def test_blocks_give_the_values_and_gradients_of_the_dense_mask(dtype, tolerance, num_tokens, window):
    generator = torch.Generator("cuda").manual_seed(0)
    documents_BT = packed_batch(num_tokens, 4).documents_BT
    layer = torch.nn.Module()
    layer.num_key_value_groups, layer.is_causal = 3, True

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=CUDA).to(dtype).requires_grad_()

    inputs = [normal(2, heads, num_tokens, 64) for heads in (6, 2, 2)]
    above = normal(2, num_tokens, 6, 64).detach()
    output = attention(layer, *inputs, document_blocks(documents_BT, window), scaling=0.125)[0]
    found = [output, *torch.autograd.grad(output, inputs, above)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    output = attention(layer, *exact, document_mask(documents_BT, window), scaling=0.125)[0]
    wanted = [output, *torch.autograd.grad(output, exact, above.double())]
    names = ("output", "query", "key", "value")
    expect_close(dict(zip(names, found, strict=True)), dict(zip(names, wanted, strict=True)), tolerance)


def test_grouped_queries_in_float32_hold_no_scores():
    heads, num_tokens, head_size = 8, 4096, 64
    layer = torch.nn.Module()
    layer.num_key_value_groups, layer.is_causal = 4, True
    inputs = [torch.randn(1, count, num_tokens, head_size, device=CUDA, requires_grad=True) for count in (heads, 2, 2)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention(layer, *inputs, None, scaling=0.125)[0].square().sum().backward()
    assert torch.cuda.max_memory_allocated() - before < heads * num_tokens * num_tokens * 4 / 2


@pytest.mark.parametrize(
    ("family", "config"),
    [("llama", {}), ("gpt_neox", {}), ("mistral", {"sliding_window": 100})],
)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("what", ["none", "selective", "full"])
def test_a_model_on_a_gpu_is_the_model_on_the_cpu(family, config, compiled, what):
    batch = packed_batch(400, 4)
    wanted = gradients(model_of(family, torch.float32, **config).cpu().train(), batch.to(torch.device("cpu")))
    model = model_of(family, torch.float32, **config).train()
    recompute(model, what)
    if compiled:
        compile_layers(model)
    expect_close(gradients(model, batch), {name: tensor.to(CUDA) for name, tensor in wanted.items()}, 1e-4)


@pytest.mark.parametrize("what", ["none", "selective", "full"])
def test_liger_kernels_give_the_stock_values_and_gradients(monkeypatch, what):
    """In bfloat16 both round: liger's are no further from the float32 model than the stock ones."""
    monkeypatch.delenv("DS_ACCELERATOR")
    batch, found = packed_batch(256, 1), {}
    for dtype, liger in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        model = model_of("qwen3", dtype).train()
        assert not liger or use_liger(model, products_kept=what == "selective")
        recompute(model, what if liger else "none")
        found[dtype, liger] = gradients(model, batch)
    exact = found[torch.float32, False]
    expect_close(found[torch.float32, True], exact, 1e-5)
    for name, reference in exact.items():
        stock, own = ((found[torch.bfloat16, liger][name].double() - reference).norm() for liger in (False, True))
        assert own < 1.5 * stock, (name, own / reference.norm(), stock / reference.norm())


def seconds(run: Callable[[], object], repeats: int = 10) -> float:
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times)


def test_walls_between_documents_cost_at_most_a_few_percent_of_a_step():
    shape = ModelShape(
        vocabulary_size=97, hidden_size=2048, intermediate_size=5504, num_layers=4, num_heads=16, max_positions=4096
    )
    model = load_plain(RandomSource(shape.to_config(), seed=1), torch.bfloat16).to(CUDA).train()
    packed = packed_batch(4096, 6)
    plain = packed._replace(documents_BT=None, positions_BT=None)
    times = {
        name: seconds(lambda batch=batch: gradients(model, batch))
        for name, batch in (("plain", plain), ("packed", packed))
    }
    assert times["packed"] < 1.05 * times["plain"], times


def test_no_wait_for_the_host_where_blocks_are_made():
    documents_BT = packed_batch(4096, 6).documents_BT
    document_blocks(documents_BT)
    torch.cuda.set_sync_debug_mode("error")
    try:
        blocks = document_blocks(documents_BT, window=1024)  # a wait would raise
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert blocks.kv_num_blocks.sum() > 0


def test_compiled_layers_under_zero3_and_an_optimiser_on_the_host(tmp_path):
    scenarios = ["recomputation", "compiled", "offloaded_optimizer"]
    runs = run_scenarios(scenarios, tmp_path, world_size=1, accelerator="cuda")
    recomputed = runs["recomputation"]
    for what in ("selective", "full"):
        for precision in ("bfloat16", "float32"):
            assert recomputed[f"{what}-{precision}"]["weights"] == recomputed[f"none-{precision}"]["weights"]
        expect_same(runs["compiled"][what]["records"], runs["compiled"]["eager"]["records"], 1e-4, 1e-4)
    assert runs["compiled"]["graph_breaks"] == 0
    offloaded = runs["offloaded_optimizer"]["offloaded"]
    expect_same(offloaded["records"], runs["offloaded_optimizer"]["plain"]["records"], 1e-3, 1e-3)
    assert offloaded["resumed_weights"] == offloaded["weights"]

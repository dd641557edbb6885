"""Float32 products by oneDNN: where they are used, and that they are right for every layout and size."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minima import cpu_products
from minima.batch import make_batch
from minima.losses import linear_cross_entropy, linear_distillation_loss
from minima.models.causal_lm import hidden_states, load_plain
from minima.models.compiling import compile_layers, recompute
from minima.models.linear_layers import use_cpu_products
from minima.models.shape import FAMILIES, ModelShape
from minima.models.weights import RandomSource
from tests.probe import probe_loss

SHAPE = {"vocabulary_size": 50, "hidden_size": 32, "intermediate_size": 128, "num_layers": 2, "num_heads": 4}
TOKENS_BT = torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(0))
needs_operator = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch has no such operator"
)


@pytest.fixture(params=[True, False], ids=["oneDNN", "stock"])
def used(request, monkeypatch) -> bool:
    """Both kinds of products, whatever the processor."""
    if request.param and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no such operator")
    monkeypatch.setattr(cpu_products, "_mkl_lacks_avx512", lambda: request.param)
    return request.param


@pytest.fixture
def forced(monkeypatch) -> None:
    """oneDNN's products, whatever the processor."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no such operator")
    monkeypatch.setattr(cpu_products, "_mkl_lacks_avx512", lambda: True)


@pytest.fixture
def linear(forced) -> torch.nn.Linear:
    """A linear layer with oneDNN's products: of 32 inputs and 96 outputs, with a bias."""
    model = model_of("gpt_neox")
    use_cpu_products(model)
    return next(module for module in model.modules() if isinstance(module, torch.nn.Linear))


def numbers(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


@pytest.fixture
def processor(tmp_path, monkeypatch):
    """Sets this machine's processor: its `vendor_id` (None if there is no such file), and the kernels PyTorch uses."""

    def pretend(maker: str | None, capability: str = "AVX512") -> bool:
        facts = tmp_path / "cpuinfo"
        facts.unlink(missing_ok=True)
        if maker is not None:
            facts.write_text(f"processor\t: 0\nvendor_id\t: {maker}\nflags\t\t: fpu avx512f\n")
        monkeypatch.setattr(cpu_products, "_CPU_FACTS", facts)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
        cpu_products._mkl_lacks_avx512.cache_clear()
        return cpu_products.is_faster(numbers(2, 2))

    yield pretend
    cpu_products._mkl_lacks_avx512.cache_clear()


@needs_operator
def test_they_are_used_where_mkl_leaves_avx512_unused_and_for_float32_alone(processor, monkeypatch):
    assert processor("AuthenticAMD")
    assert not cpu_products.is_faster(numbers(2, 2), numbers(2, 2).bfloat16())
    assert not cpu_products.is_faster(numbers(2, 2).double())
    with monkeypatch.context() as off:
        off.setattr(torch.backends.mkldnn, "enabled", False)
        assert not cpu_products.is_faster(numbers(2, 2))
    assert not processor("GenuineIntel")
    assert not processor(None)
    assert not processor("AuthenticAMD", capability="AVX2")


LAYOUTS = {
    "rows": lambda matrix: matrix,
    "columns": lambda matrix: matrix.t().contiguous().t(),
    "neither": lambda matrix: torch.stack([matrix, matrix], dim=2)[:, :, 1],
}


@needs_operator
@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize(
    ("rows", "columns", "inner"), [(1, 1, 1), (7, 5, 3), (130, 257, 65), (3, 600, 17), (0, 4, 5), (4, 0, 5)]
)
def test_a_product_is_right_for_every_layout(left, right, rows, columns, inner):
    given, bias = (LAYOUTS[left](numbers(rows, inner)), LAYOUTS[right](numbers(columns, inner))), numbers(columns)
    wanted = (given[0].double() @ given[1].double().t()).float()
    torch.testing.assert_close(cpu_products.product(*given), wanted)
    torch.testing.assert_close(cpu_products.product(*given, bias), wanted + bias)
    torch.testing.assert_close(
        cpu_products.product(*given, numbers(columns, 2)[:, 0]), wanted + numbers(columns, 2)[:, 0]
    )
    batched = cpu_products.product(given[0].expand(2, 3, rows, inner), given[1])
    torch.testing.assert_close(batched, wanted.expand(2, 3, rows, columns))


@needs_operator
def test_large_results_are_computed_in_tiles(monkeypatch):
    monkeypatch.setattr(cpu_products, "_TILE_ELEMENTS", 1)
    hidden, head, gradient = numbers(33, 8), numbers(600, 8), numbers(33, 600)
    assert len(cpu_products._tiles(600, 33)) == 10
    out = torch.full((33, 600), torch.nan)
    assert cpu_products.product_into(out, hidden, head) is out
    torch.testing.assert_close(out, hidden @ head.t())
    added = numbers(600, 8)
    cpu_products.add_transposed_product(added, gradient, hidden)
    torch.testing.assert_close(added, numbers(600, 8) + gradient.t() @ hidden)


def test_the_losses_are_those_of_a_float64_reference(used):
    student, head, teacher, teacher_head = numbers(70, 12), numbers(300, 12), numbers(70, 20), numbers(300, 20)
    labels = torch.arange(70).where(torch.arange(70) % 5 > 0, -100)
    leaves = [student.requires_grad_(), head.requires_grad_()]
    loss = linear_distillation_loss(student, head, teacher, teacher_head, labels, chunk_tokens=32)
    alone = linear_cross_entropy(student, head, labels, chunk_tokens=32)
    found = torch.autograd.grad(loss.total + alone.total, leaves)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    kept = labels >= 0
    log_s = (wide[0] @ wide[1].t()).log_softmax(-1)[kept]
    log_t = (teacher.double() @ teacher_head.double().t()).log_softmax(-1)[kept]
    hard = -log_s.gather(1, labels[kept].unsqueeze(1)).sum()
    wanted = 0.5 * hard - 0.5 * (log_t.exp() * log_s).sum() + hard
    torch.testing.assert_close((loss.total + alone.total).double(), wanted.detach(), rtol=1e-5, atol=0)
    for one, other in zip(found, torch.autograd.grad(wanted, wide), strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-5)


def model_of(family: str = "llama"):
    config = ModelShape(family=family, **SHAPE).to_config() | {"initializer_range": 0.3}
    return load_plain(RandomSource(config, seed=1)).train()


def states_and_gradients(model) -> dict[str, torch.Tensor]:
    states = hidden_states(model, make_batch(TOKENS_BT))
    probe_loss(states).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"hidden states": states.detach()} | found


def check_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    far = [name for name in wanted if not torch.allclose(found[name], wanted[name], rtol=1e-3, atol=1e-4)]
    assert not far


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recomputing", ["none", "selective", "full"])
def test_a_model_with_them_is_the_stock_model(used, family, recomputing):
    model = model_of(family)
    use_cpu_products(model)
    recompute(model, recomputing)
    check_close(states_and_gradients(model), states_and_gradients(model_of(family)))


@pytest.mark.parametrize("compiled", [False, True])
def test_no_linear_layer_is_left_out(used, compiled):
    model = model_of()
    use_cpu_products(model)
    if compiled:
        compile_layers(model, "aot_eager_decomp_partition")  # a graph break would be an error
    check_close(states_and_gradients(model), states_and_gradients(model_of()))  # and compiles
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        states_and_gradients(model)
    calls = {event.key: event.count for event in profile.key_averages()}
    linears = sum(isinstance(module, torch.nn.Linear) for module in model.base_model.modules())
    ours, stock = (calls.get(name, 0) for name in ("minima::product", "aten::mm"))
    assert (ours, stock) == ((3 * linears, 0) if used else (0, 3 * linears)), "forward, and both gradients"


def test_frozen_weights_get_no_gradient_and_keep_no_inputs(linear):
    linear.requires_grad_(False)
    inputs = numbers(2, 3, 32).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda shape: shape):
        output = linear(inputs)
    assert kept == [linear.weight.shape]
    linear(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad, linear.weight.sum(0).expand(2, 3, 32))
    with torch.no_grad():
        torch.testing.assert_close(linear(inputs), output.detach())


def test_second_derivatives_are_those_of_a_stock_layer(linear):
    stock, inputs, found = torch.nn.Linear(32, 96), numbers(3, 32).requires_grad_(), []
    stock.load_state_dict(linear.state_dict())
    for layer in (linear, stock):
        output, wanted = layer(inputs), [inputs, layer.weight]
        first = torch.autograd.grad(output.sum() + output.square().sum(), wanted, create_graph=True)
        found.append((*first, *torch.autograd.grad(sum(one.square().sum() for one in first), wanted)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_other_dtypes_and_autocast_are_a_stock_layers(linear):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(numbers(3, 32)).dtype == torch.bfloat16
    assert linear.double()(numbers(3, 32).double()).dtype == torch.float64


def test_no_rows_give_a_gradient_of_zeros(linear):
    linear(torch.ones(0, 32, requires_grad=True)).sum().backward()
    assert not linear.weight.grad.any()


class Counted(TorchDispatchMode):
    """Counts calls of `cpu_products`' operator, and keeps the size of the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func is cpu_products.PRODUCT:
            self.calls, self.largest = self.calls + 1, max(self.largest, found.numel())
        return found


def test_selective_recomputation_runs_no_product_twice(forced):
    calls = {}
    for recomputing in ("none", "selective", "full"):
        model = model_of()
        use_cpu_products(model)
        recompute(model, recomputing)
        with Counted() as counted:
            states_and_gradients(model)
        calls[recomputing] = counted.calls
    assert calls["none"] == calls["selective"] < calls["full"]


@pytest.mark.parametrize("tokens", [1, 40, 65])
def test_no_result_of_the_loss_is_larger_than_a_tile(forced, monkeypatch, tokens):
    monkeypatch.setattr(cpu_products, "_TILE_ELEMENTS", 64 * 64)
    hidden, head = numbers(tokens, 24).requires_grad_(), numbers(5000, 24).requires_grad_()
    labels = torch.zeros(tokens, dtype=torch.int64)
    with Counted() as counted:
        linear_cross_entropy(hidden, head, labels, chunk_tokens=64).total.backward()
    assert counted.calls and counted.largest <= 64 * 64

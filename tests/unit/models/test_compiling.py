"""What the backward pass recomputes, and compiled layers, on whole models."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minima.batch import make_batch
from minima.models.causal_lm import hidden_states, load_plain
from minima.models.compiling import compile_layers, decoder_layers, recompute
from minima.models.shape import FAMILIES, ModelShape
from minima.models.weights import RandomSource
from tests.probe import probe_loss

SMALL = {"vocabulary_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_layers": 3, "num_heads": 4}
TOKENS_BT = torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(0))
DOCUMENTS_BT = torch.tensor([[0] * 5 + [1] * 19, [0] * 24])
BACKEND = "aot_eager_decomp_partition"  # partitions as inductor does, and compiles nothing


class Watch(TorchDispatchMode):
    """Counts matrix products and attentions, and the bytes of results that are still held, but for views of weights."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.products, self.attentions, self.seen = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        self.attentions += "scaled_dot_product" in str(func) and "backward" not in str(func)
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.weights:
                    self.seen[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return found

    def held_bytes(self) -> int:
        return sum(size for reference, size in self.seen.values() if not reference.expired())


def model_of(family: str = "llama"):
    config = ModelShape(family=family, **SMALL).to_config() | {"initializer_range": 0.3, "sliding_window": None}
    return load_plain(RandomSource(config, seed=1)).train()


def gradients(model, documents=DOCUMENTS_BT) -> dict[str, torch.Tensor]:
    model.zero_grad()
    probe_loss(hidden_states(model, make_batch(TOKENS_BT, documents_BT=documents))).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("documents", [None, DOCUMENTS_BT])
def test_selective_keeps_products_and_attention_and_full_keeps_nothing(family, documents):
    held, products, attentions, found = {}, {}, {}, {}
    for what in ("none", "selective", "full"):
        model = model_of(family)
        recompute(model, what)
        with Watch(model) as watch:
            loss = probe_loss(hidden_states(model, make_batch(TOKENS_BT, documents_BT=documents)))
            held[what] = watch.held_bytes()
        with Watch(model) as watch:
            loss.backward()
            products[what], attentions[what] = watch.products, watch.attentions
        found[what] = gradients(model, documents)
    assert held["none"] > 1.2 * held["selective"] and held["selective"] > 1.5 * held["full"], held
    assert products["none"] == products["selective"] < products["full"], products
    assert attentions == {"none": 0, "selective": 0, "full": 3}
    for what in ("selective", "full"):
        assert all(found[what][name].equal(gradient) for name, gradient in found["none"].items()), what


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_layers_are_one_graph_with_the_same_gradients(family):
    torch._dynamo.reset()
    plain, model, other = model_of(family), model_of(family), model_of(family)
    calls = []
    decoder_layers(model)[0].register_forward_hook(lambda *_: calls.append(torch._dynamo.is_compiling()))
    compile_layers(model, BACKEND)
    counters.clear()
    for documents in (None, DOCUMENTS_BT):
        wanted, found = gradients(plain, documents), gradients(model, documents)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    assert calls == [False, False], "a hook on the layer stays outside"
    assert not any("forward" in vars(module) for module in other.modules()), "only the one instance is compiled"
    assert list(dict(model.named_parameters())) == list(dict(plain.named_parameters()))


@pytest.mark.parametrize("what", ["none", "selective", "full"])
def test_a_hook_on_a_layer_runs_once_whatever_is_recomputed(what):
    """ZeRO-3's gather the layer's weights: run again, they would do so once more than the backward pass needs."""
    model, calls = model_of(), []
    recompute(model, what)
    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(lambda *_: calls.append("layer"))
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append("inside"))
    gradients(model)
    assert calls.count("layer") == 3 and calls.count("inside") == (3 if what == "none" else 6)


def test_layers_whose_weights_have_numbers_are_one_graph(monkeypatch):
    """As under ZeRO-3, whose linear layer asks for the number; PyTorch 2.11 compared it even where it is only there."""
    torch._dynamo.reset()
    model, linear = model_of(), torch.nn.functional.linear
    for number, weight in enumerate(model.parameters()):
        weight.ds_id = number

    def numbered_linear(states, weight, bias=None):
        return linear(states, weight, bias) if weight.ds_id >= 0 else states

    monkeypatch.setattr(torch.nn.functional, "linear", numbered_linear)
    compile_layers(model, BACKEND)
    counters.clear()
    gradients(model)
    assert counters["stats"]["unique_graphs"] == 1


def test_recomputation_is_part_of_a_compiled_layer():
    wanted, kept = gradients(model_of()), {}
    for what in ("none", "selective", "full"):
        torch._dynamo.reset()
        model, kept[what] = model_of(), {}
        recompute(model, what)
        compile_layers(model, BACKEND)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def keep(tensor: torch.Tensor, weights=weights, sizes=kept[what]) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() in weights:
                assert isinstance(tensor, torch.nn.Parameter), "a view of a weight outlives what ZeRO-3 gathered"
            else:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = gradients(model)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    held = {what: sum(sizes.values()) for what, sizes in kept.items()}
    # Without recomputation that was asked for, the partitioner already recomputes what is cheap.
    assert held["none"] >= held["selective"] > 1.5 * held["full"], held

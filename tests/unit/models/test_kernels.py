"""liger-kernel in one model: which modules run it, and numbers through Triton's interpreter in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface

from minima.errors import RecipeError, UnsupportedFamily
from minima.models import kernels
from minima.models.causal_lm import load_plain
from minima.models.kernels import use_liger
from minima.models.shape import ModelShape
from minima.models.weights import RandomSource

SMALL = {"vocabulary_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4}
RMS_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def model_of(family: str, **config):
    settings = ModelShape(family=family, **SMALL).to_config() | {"initializer_range": 0.3} | config
    return load_plain(RandomSource(settings, seed=1)).train()


@pytest.fixture
def named_functions(monkeypatch):
    """Functions that say which they are, in the place of liger-kernel's."""
    norm = SimpleNamespace(apply=lambda hidden, weight, *rest: hidden * 0 + 2)
    product = SimpleNamespace(apply=lambda gate, up, *rest: gate * 0 + 3)
    rotation = SimpleNamespace(apply=lambda queries, keys, cos, sin: (queries * 0 + 4, keys))
    functions = SimpleNamespace(LigerRMSNormFunction=norm, LigerSiLUMulFunction=product, LigerRopeFunction=rotation)
    monkeypatch.setattr(kernels, "_liger_functions", lambda: functions)


@pytest.mark.parametrize("family", RMS_FAMILIES)
def test_one_instance_changes_and_its_parameters_stay_the_same_objects(named_functions, family):
    model, other = model_of(family), model_of(family)
    before = dict(model.named_parameters())
    replaced = use_liger(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == {
        name: id(parameter) for name, parameter in before.items()
    }
    assert list(model.state_dict()) == list(other.state_dict())
    norms = 2 + (2 if family == "qwen3" else 0)  # queries and keys are normalised, too
    assert len(replaced) == 2 * (norms + 2) + 1
    assert {path.rpartition(".")[2] for path in replaced} >= {"mlp", "norm", "input_layernorm", "self_attn"}
    hidden = torch.randn(1, 3, 32)
    assert (model.base_model.norm(hidden) == 2).all()
    mlp = model.base_model.layers[1].mlp
    assert mlp(hidden).equal(mlp.down_proj(torch.full((1, 3, 48), 3.0)))
    seen, stock = queries(model), queries(other)
    assert len(seen) == len(stock) == 2
    assert all((query == 4).all() for query in seen) and not any((query == 4).any() for query in stock)
    assert not any("forward" in vars(module) for module in other.modules())
    assert not (other.base_model.norm(hidden) == 2).any()


def queries(model):
    """What the attention of each layer is given."""
    seen = []

    def attention(module, query, key, value, mask, **settings):
        seen.append(query)
        return value.transpose(1, 2), None

    AttentionInterface.register("seen", attention)
    try:
        model.config._attn_implementation = "seen"
        model(torch.arange(5).view(1, 5))
    finally:
        AttentionInterface._global_mapping.pop("seen")
    return seen


def test_another_activation_keeps_the_stock_mlp(named_functions):
    replaced = use_liger(model_of("llama", hidden_act="gelu"))
    assert replaced and not any(path.endswith("mlp") for path in replaced)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_families_without_such_modules_are_refused_by_name(family):
    with pytest.raises(UnsupportedFamily, match=f"kernels: liger for a {family} model"):
        use_liger(model_of(family))


def test_without_a_gpu_or_the_package_or_triton_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # DS_ACCELERATOR=cpu leaves it alone
    real = kernels.importlib.import_module
    monkeypatch.setattr(
        kernels.importlib, "import_module", lambda name: SimpleNamespace() if "liger" in name else real(name)
    )
    with pytest.raises(RecipeError, match="without a GPU"):
        use_liger(model_of("llama"))
    monkeypatch.setattr(kernels, "_has_gpu", lambda: True)
    monkeypatch.setattr(kernels, "triton_trouble", lambda: "no C compiler")
    with pytest.raises(RecipeError, match=r"(?s)no C compiler.*python3-dev"):
        use_liger(model_of("llama"))
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setattr(kernels.importlib, "import_module", real)
    with pytest.raises(RecipeError, match=r"pip install liger-kernel"):
        use_liger(model_of("llama"))


INTERPRETED = """
import torch
import triton
from liger_kernel.ops import rms_norm
from triton.runtime import interpreter
import tests.interpreted
from minima.batch import make_batch
from minima.models import kernels
from minima.models.causal_lm import hidden_states
from minima.models.compiling import recompute
from tests.probe import probe_loss
from tests.unit.models.test_kernels import model_of
class Scalar(float):
    def to(self, dtype):
        return float(self)


# The interpreter hands a kernel its Python numbers as they are, and liger-kernel's call their `to`; and it has no CUDA
# library, whose `rsqrt` is taken.
rms_norm.rsqrt = lambda value: triton.language.rsqrt(value)
convert = interpreter._implicit_cvt
interpreter._implicit_cvt = lambda argument: Scalar(argument) if type(argument) is float else convert(argument)
tokens = torch.arange(14).view(2, 7)
for family, what in (("llama", "none"), ("qwen3", "full"), ("mistral", "selective")):
    results = []
    for liger in (False, True):
        model = model_of(family, num_key_value_heads=2)
        if liger:
            kernels._has_gpu = lambda: True  # the interpreter runs the kernels on the CPU
            kernels.triton_trouble = lambda: None
            assert kernels.use_liger(model, products_kept=what == "selective")
        recompute(model, what)
        hidden = hidden_states(model, make_batch(tokens))
        probe_loss(hidden).backward()
        named = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        results.append({"hidden": hidden.detach(), **named})
    assert len(results[0]) == len(results[1]) > 10
    for name, wanted in results[0].items():
        torch.testing.assert_close(results[1][name], wanted, rtol=1e-4, atol=1e-5, msg=lambda text: name + text)
    assert not results[0]["hidden"].equal(results[1]["hidden"]), "the same bits: no kernel of liger has run"
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("liger_kernel", "triton")), reason="liger-kernel is not there"
)
def test_numbers_are_the_stock_ones_through_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", INTERPRETED], check=True, env=environment, cwd=os.getcwd(), timeout=300)

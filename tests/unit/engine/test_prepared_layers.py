"""What is chosen for a model's layers, and where it is refused."""

import pytest
from deepspeed.utils import get_z3_leaf_modules

from minima.engine import layers
from minima.engine.layers import prepare_layers
from minima.errors import RecipeError
from minima.models.compiling import decoder_layers
from minima.models.shape import ModelShape
from minima.models.stock import build_empty

SMALL = {"vocabulary_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4}


def model():
    return build_empty(ModelShape(**SMALL).to_config())


@pytest.mark.parametrize("compiled", [False, True])
def test_layers_are_leaves_of_this_model_alone(compiled):
    prepared, other = model(), model()
    prepare_layers(prepared, compiled=compiled)
    assert get_z3_leaf_modules(prepared) == decoder_layers(prepared)
    assert get_z3_leaf_modules(other) == []
    assert any("forward" in vars(module) for module in prepared.modules()) == compiled
    assert not any("forward" in vars(module) for module in other.modules())


def test_the_compiler_is_refused_on_a_gpu_where_triton_starts_no_kernel(monkeypatch):
    monkeypatch.setattr(layers, "triton_trouble", lambda: "no C compiler")
    prepare_layers(model(), compiled=True)  # on a CPU it writes C++
    monkeypatch.setattr(layers, "_on_gpu", lambda model: True)
    with pytest.raises(RecipeError, match=r"(?s)compile: true.*no C compiler.*python3-dev"):
        prepare_layers(model(), compiled=True)
    prepare_layers(model())

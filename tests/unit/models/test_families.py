"""The table of families names exactly the modules and tensors of the stock models."""

import pytest
import torch

from minima.errors import UnsupportedFamily
from minima.models.families import Part, family_of, layout, shape_of
from minima.models.shape import FAMILIES, ModelShape
from minima.models.stock import build_empty


def shape(family: str) -> ModelShape:
    return ModelShape(
        family=family, vocabulary_size=11, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=3
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_and_module_is_where_the_table_says(name):
    family, one = family_of(name), shape(name)
    with torch.device("meta"):
        model = build_empty(one.to_config())
    for tensor_name, parameter in model.named_parameters():
        layer, _, axes = family.locate(tensor_name)
        assert (layer is None) == (".0." not in tensor_name and ".1." not in tensor_name)
        for part, size in zip(axes, parameter.shape, strict=True):
            if part is not None:
                outer, units, inner = layout(part, one)
                assert outer * units * inner == size, tensor_name
    layers = list(model.get_submodule(family.layers).children())
    assert len(layers) == one.num_layers
    for path in (family.attention_output, family.mlp_output, *family.norms):
        assert hasattr(layers[0].get_submodule(path), "weight")
    for path in (*family.embeddings, family.final_norm):
        assert hasattr(model.get_submodule(path), "weight")
    assert set(family.config_names.values()) - {"head_dim"} <= set(model.config.to_dict())


def test_a_group_holds_its_query_heads():
    one = ModelShape(
        vocabulary_size=11, hidden_size=24, intermediate_size=40, num_layers=1, num_heads=6, num_key_value_heads=2
    )
    assert layout(Part.QUERY, one) == (1, 2, 12)
    assert layout(Part.KEY_VALUE, one) == (1, 2, 4)


def test_unknown_families_and_tensors_are_refused():
    with pytest.raises(UnsupportedFamily, match="'bert'"):
        family_of("bert")
    with pytest.raises(UnsupportedFamily, match="'mamba'"):
        shape_of({"model_type": "mamba"})
    with pytest.raises(UnsupportedFamily, match="cross-attention"):
        shape_of(shape("gpt2").to_config() | {"add_cross_attention": True})
    with pytest.raises(UnsupportedFamily, match="lora_A"):
        family_of("llama").locate("model.layers.0.self_attn.q_proj.lora_A.weight")
    assert shape_of(shape("gpt2").to_config()) == shape("gpt2")

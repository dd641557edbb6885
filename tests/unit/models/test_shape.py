"""Shapes count what stock models really have, and come back from their configurations."""

import json

import pytest
import torch

from minima.errors import CheckpointError, MinimaError, ShapeError, UnsupportedFamily
from minima.models.shape import ModelShape
from minima.models.stock import build_empty, parameter_shapes, stock_config

SMALL = {"vocabulary_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_layers": 3, "num_heads": 4}
FAMILIES = {
    "llama": {"num_key_value_heads": 2, "rope_theta": 5e5},
    "mistral": {"num_key_value_heads": 2, "tied": True},
    "qwen2": {"num_key_value_heads": 2, "rope_theta": 1e6},
    "qwen3": {"num_key_value_heads": 2, "head_size": 24},
    "gpt_neox": {"rope_theta": 5e4},
    "gpt2": {"tied": True},
}


@pytest.fixture(params=list(FAMILIES))
def shape(request) -> ModelShape:
    return ModelShape(family=request.param, max_positions=128, **SMALL, **FAMILIES[request.param])


def test_parameters_are_the_stock_models(shape):
    with torch.device("meta"):
        model = build_empty(shape.to_config())
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert len(parameter_shapes(shape.to_config())) == len(list(model.parameters()))


def test_a_shape_comes_back_from_the_stock_configuration(shape):
    config = stock_config(shape.to_config())
    assert ModelShape.from_config(json.loads(config.to_json_string())) == shape
    assert ModelShape.from_config(shape.to_config()) == shape


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_configuration_leaves_out_is_what_transformers_takes(family):
    """As one that was written by hand: Mistral then has 8 key-value heads, and a Qwen3's heads are 128 wide."""
    llama = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 1,
             "num_attention_heads": 32}  # fmt: skip
    gpt2 = {"vocab_size": 64, "n_embd": 128, "n_layer": 1, "n_head": 32}
    short = {"model_type": family} | (gpt2 if family == "gpt2" else llama)
    assert ModelShape.from_config(short) == ModelShape.from_config(stock_config(short).to_dict())
    with torch.device("meta"):
        model = build_empty(short)
    assert ModelShape.from_config(short).parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_rotary_base_reaches_the_model(family):
    shape = ModelShape(family=family, rope_theta=12345.0, **SMALL)
    assert stock_config(shape.to_config()).rope_parameters["rope_theta"] == 12345.0


def test_the_papers_models():
    student = ModelShape(vocabulary_size=49216, hidden_size=3072, intermediate_size=8192, num_layers=24, num_heads=24)
    teacher = ModelShape(vocabulary_size=49216, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32)
    assert student.parameters == 3_020_442_624
    assert round(teacher.parameters / 1e9, 3) == 6.879 and round(teacher.non_embedding_parameters / 1e9, 3) == 6.476
    # Model work of one distilled token, full causal attention at 4,096 tokens counted by half: 33.5 GFLOP.
    flops = student.training_flops_per_token(4096) + teacher.forward_flops_per_token(4096)
    assert flops / 1e9 == pytest.approx(33.5, abs=0.05)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_heads": 5},
        {"num_key_value_heads": 3},
        {"family": "gpt2", "num_key_value_heads": 2},
        {"family": "gpt_neox", "head_size": 8},
        {"head_size": 7},
        {"hidden_size": 54, "num_heads": 6},
        {"family": "qwen3", "hidden_size": 12, "num_heads": 16},
    ],
)
def test_what_stock_configurations_refuse_is_refused(wrong):
    with pytest.raises(ValueError, match="heads") as caught:
        ModelShape(**(SMALL | wrong))
    assert isinstance(caught.value.errors()[0]["ctx"]["error"], ShapeError)


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])
def test_odd_heads_are_no_mistake_where_not_all_of_a_head_is_turned(family):
    shape = ModelShape(family=family, **(SMALL | {"hidden_size": 54, "num_heads": 6}))
    model = build_empty(shape.to_config())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    assert model(torch.arange(8).unsqueeze(0)).logits.isfinite().all()


def test_a_model_has_layers():
    with pytest.raises(ValueError, match="num_layers"):
        ModelShape(**(SMALL | {"num_layers": 0}))


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "llama", "vocab_size": 9}', '{"model_type": "gpt2"}'])
def test_a_broken_configuration_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(MinimaError, match=r"config\.json"):
        ModelShape.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("family", "wrong", "named"),
    [
        ("llama", {"rope_parameters": [1]}, "rope_theta"),
        ("gpt2", {"n_embd": {"a": 1}}, "n_embd"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ],
)
def test_a_field_that_is_no_number_is_named(family, wrong, named):
    config = ModelShape(**(SMALL | {"family": family, "num_key_value_heads": SMALL["num_heads"]})).to_config() | wrong
    with pytest.raises(ShapeError, match=f"{named} is missing or impossible"):
        ModelShape.from_config(config)


def test_quantised_weights_are_refused_before_anything_runs():
    config = ModelShape(**SMALL).to_config()
    with pytest.raises(CheckpointError, match="its weights are quantised"):
        ModelShape.from_config(config | {"quantization_config": {"quant_method": "fp8"}})
    idle = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}
    for unquantised in (None, {}, idle):
        ModelShape.from_config(config | {"quantization_config": unquantised})


def test_an_impossible_configuration_says_why():
    config = ModelShape(**SMALL).to_config() | {"num_attention_heads": 5, "num_key_value_heads": 5}
    with pytest.raises(ShapeError, match="64 does not divide into 5 heads"):
        ModelShape.from_config(config)


def test_nothing_drops_out_whatever_the_configuration_says():
    config = ModelShape(family="gpt2", **SMALL).to_config()
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        del config[name]  # transformers' default is then 0.1
    model = build_empty(config).train()
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


def test_an_unknown_family_is_refused_by_name():
    with pytest.raises(UnsupportedFamily, match="mamba"):
        ModelShape.from_config({"model_type": "mamba"})


def test_a_padding_token_keeps_no_row_from_training():
    config = ModelShape(**SMALL).to_config() | {"pad_token_id": 2}
    assert build_empty(config).get_input_embeddings().padding_idx is None


@pytest.mark.parametrize(
    ("family", "biases"),
    [
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("qwen3", {"attention_bias": True, "head_size": 24}),
        ("gpt2", {}),
    ],
)
def test_biases_and_an_untied_head_are_counted(family, biases):
    groups = {} if family == "gpt2" else {"num_key_value_heads": 2}
    shape = ModelShape(family=family, **SMALL, **groups, **biases)
    with torch.device("meta"):
        model = build_empty(shape.to_config())
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert ModelShape.from_config(stock_config(shape.to_config()).to_dict()) == shape

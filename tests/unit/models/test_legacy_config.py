"""Both generations' names in one config.json. That 4.x really reads them is tests/pipeline/test_transformers_4x.py."""

import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from minima.models.legacy_config import stored_name, tokenizer_with_4x_names, with_4x_names
from minima.models.shape import FAMILIES

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def stock(family: str, **fields) -> dict:
    return AutoConfig.for_model(family, **fields).to_dict()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_rotary_base_and_dtype_get_their_old_names(family):
    config = stock(family, **SMALL, rope_theta=123456.0, dtype="bfloat16")
    assert "rope_theta" not in config, "transformers 5 writes the old name itself: this function is no longer needed"
    both = with_4x_names(config)
    assert (both["rope_theta"], both["rope_scaling"], both["torch_dtype"]) == (123456.0, None, "bfloat16")
    assert both["rope_parameters"] == {"rope_theta": 123456.0, "rope_type": "default"}


def test_gpt_neox_keeps_its_own_names():
    both = with_4x_names(stock("gpt_neox", **SMALL, rotary_emb_base=50000.0, rotary_pct=0.5))
    assert (both["rotary_emb_base"], both["rotary_pct"], both["rope_theta"]) == (50000.0, 0.5, 50000.0)


def test_gpt_neox_does_not_read_the_llama_name():
    both = with_4x_names({"model_type": "gpt_neox", "rope_theta": 7.0})
    assert both["rope_theta"] == both["rotary_emb_base"] == 10000.0  # transformers 5 leaves `rope_theta` aside here


def test_scaled_rotation_keeps_its_parameters():
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = stock("llama", **SMALL, max_position_embeddings=128, rope_parameters={**rope, "rope_theta": 5e5})
    both = with_4x_names(config)
    assert both["rope_theta"] == 5e5
    assert both["rope_scaling"] == {**rope, "original_max_position_embeddings": 128}


def test_old_names_alone_gain_the_new_ones():
    both = with_4x_names({"model_type": "llama", "rope_theta": 5e5, "torch_dtype": "float16"})
    assert both["rope_parameters"] == {"rope_theta": 5e5, "rope_type": "default"}
    assert both["dtype"] == "float16"


def test_gpt2_has_no_rotation_to_name():
    assert "rope_theta" not in with_4x_names(stock("gpt2", n_embd=32, n_head=4, n_layer=2, vocab_size=64))


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_5_reads_the_same_model(family):
    config = stock(family, rope_theta=123456.0) if family != "gpt_neox" else stock(family, rotary_emb_base=123456.0)
    before = AutoConfig.for_model(**config).to_dict()
    after = AutoConfig.for_model(**with_4x_names(config)).to_dict()
    assert {name: after.get(name) for name in before} == before
    again = with_4x_names(with_4x_names(config))
    assert again == with_4x_names(config)


def test_no_code_of_others_is_named():
    code = {"auto_map": {"AutoModelForCausalLM": "somebody/model--modeling.Model"}}
    assert "auto_map" not in with_4x_names({"model_type": "gpt2"} | code)
    assert "auto_map" not in tokenizer_with_4x_names({"tokenizer_class": "Own"} | code)


def test_tokenizer_class_that_4x_knows():
    config = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "extra_special_tokens": ["<a>"]}
    expected = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<a>"]}
    assert tokenizer_with_4x_names(config) == expected
    assert tokenizer_with_4x_names({"tokenizer_class": "LlamaTokenizer"}) == {"tokenizer_class": "LlamaTokenizer"}


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_names_are_those_that_transformers_writes(family, tmp_path):
    small = {"n_embd": 32, "n_head": 4, "n_layer": 1, "vocab_size": 64} if family == "gpt2" else SMALL
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **small, intermediate_size=48))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {stored_name(family, name) for name, _ in model.named_parameters()} == set(file.keys())

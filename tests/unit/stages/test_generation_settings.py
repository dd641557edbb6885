"""Which tokens end a text, as an exported folder tells `generate`."""

import pytest
from transformers import GenerationConfig

from minima.data.tokenizer import load_tokenizer
from minima.stages.release.generation_settings import CHAT_SAMPLING, generation_settings

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer(chat_folder):
    return load_tokenizer(chat_folder)


def test_every_token_that_may_end_a_text_is_named(tokenizer, tmp_path):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "pad_token": "<pad>"})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = generation_settings({"bos_token_id": None, "eos_token_id": 0}, tmp_path, chat=True)
    assert found.pop("eos_token_id") == [0, 2, end]
    rest = {"bos_token_id": 1, "pad_token_id": tokenizer.pad_token_id}
    assert found == rest | CHAT_SAMPLING
    base = generation_settings({"eos_token_id": 0}, tmp_path, chat=False)
    assert base == rest | {"eos_token_id": [0, 2, end]}, "a template that was taken over makes nothing sample"


def test_a_base_model_does_not_sample(tokenizer, tmp_path):
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    expected = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert generation_settings({"eos_token_id": 2}, tmp_path, chat=True) == expected
    assert generation_settings({"eos_token_id": [2, 7]}, tmp_path, chat=False) == expected | {"eos_token_id": [2, 7]}


def test_without_a_tokenizer_the_configuration_tells_all(tmp_path):
    assert generation_settings({}, None, chat=True) == {}
    expected = {"eos_token_id": 5, "pad_token_id": 5}
    assert generation_settings({"eos_token_id": 5}, None, chat=True) == expected
    assert generation_settings({"eos_token_id": 5}, tmp_path, chat=True) == expected, "an empty folder is no tokenizer"


def test_transformers_takes_what_is_suggested(chat_folder):
    config = GenerationConfig(**generation_settings({}, chat_folder, chat=True))
    config.validate(strict=True)  # raises where two settings do not go together
    assert config.do_sample and config.temperature == 0.7

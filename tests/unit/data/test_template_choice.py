"""Two tokenizers write conversations in one way, or it is told where their texts part."""

import pytest

from minima.data.template_choice import other_format, set_template
from minima.data.tokenizer import load_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = CHATML.replace(
    "{{ m.content }}<|im_end|>",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}",
).replace("\n{% endfor", "\n\n{% endfor")


@pytest.fixture
def save(byte_level, tmp_path):
    """Writes the tokenizer with a template and gives its folder."""

    def write(name, template):
        loaded = load_tokenizer(byte_level)
        if template == "minichat":
            set_template(loaded, template)
        else:
            loaded.chat_template = template
        loaded.save_pretrained(tmp_path / name)
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ("minichat", r"'<|im_start|>user\nzebra"),
        (CHATML.replace("<|im_end|>\n", "<|im_end|>\n\n"), r"<|im_start|>"),
        (CHATML + "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}", "'(refused)'"),
        (CHATML.replace("%}<|im_start|>assistant\n", "%}"), "against"),  # only asks in another way
        (
            "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}" + CHATML,
            "Be good.",
        ),
    ],
)
def test_where_two_formats_part(save, other, told):
    found = other_format(save("data", CHATML), save("own", other))
    assert found is not None and told in found
    assert other_format(save("data", other), save("own", CHATML)) is not None


def test_marks_alone_are_no_other_format(save):
    assert MARKED.count("generation %}") == 2
    assert other_format(save("data", MARKED), save("own", CHATML)) is None


def test_another_end_token_is_another_format(save, tmp_path):
    data, own = save("data", "minichat"), save("own", "minichat")
    assert other_format(data, own) is None
    loaded = load_tokenizer(own)
    loaded.eos_token = "<|im_end|>"
    loaded.save_pretrained(own)
    assert "<|im_end|>" in (other_format(data, own) or "")


def test_what_has_no_template_is_not_compared(save, tmp_path, caplog):
    assert other_format(save("data", CHATML), save("own", None)) is None
    assert not caplog.records
    assert other_format(tmp_path / "data", tmp_path / "nowhere") is None
    assert "cannot tell" in caplog.text

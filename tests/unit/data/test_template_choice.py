"""Which templates are taken and which refused; and whether two tokenizers write conversations in one way."""

import pytest

from minima.data.chats.template_choice import other_format, set_template
from minima.data.chats.templates import chat_tokenizer, stop_ids, template_of
from minima.data.tokenizer import load_tokenizer
from minima.errors import DataError

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


# -- choosing a template -----------------------------------------------------------------------------------------


@pytest.fixture
def chatml(byte_level):
    loaded = load_tokenizer(byte_level)
    loaded.chat_template = CHATML
    return loaded


def test_own_template_where_there_is_one(chatml, byte_level, tmp_path):
    set_template(chatml, None)
    assert chatml.chat_template == CHATML
    set_template(chatml, "own")
    assert chatml.chat_template == CHATML
    set_template(chatml, "minichat")
    assert "[|User|]" in chatml.chat_template
    path = tmp_path / "mine.jinja"
    path.write_text(CHATML.replace("user", "USER"))
    set_template(chatml, str(path))
    assert chatml.chat_template == path.read_text()
    with pytest.raises(DataError, match=r"nowhere.jinja' cannot be read"):
        set_template(chatml, "nowhere.jinja")
    with pytest.raises(DataError, match="no chat template of its own"):
        set_template(load_tokenizer(byte_level), "own")


REFUSALS = {
    "its own message": ("{{ raise_exception('only poems, please') }}", "only poems, please"),
    "broken": ("{% for m in messages %}", "Unexpected end of template"),
    "wrong types": ("{{ messages[0].content + 1 }}", "can only concatenate"),
    "division by zero": ("{{ 1 / 0 }}", "division by zero"),
    "a range without end": ("{% for i in range(10 ** 9) %}a{% endfor %}", "Range too big"),
    "a macro without end": ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion depth"),
    "more than there is memory": ("{{ 'a' * 10 ** 15 }}", "MemoryError"),
    "a failure between marks": ("{% generation %}{{ 1 / 0 }}{% endgeneration %}", "division by zero"),
    "last turn in another way": (
        "{% for m in messages %}{{ m.role }}:{{ m.content if loop.last else 'x' }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        "writes earlier turns differently",
    ),
    "too many marks": (
        "{% for m in messages %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}",
        "marks more or fewer replies",
    ),
    "no end marker": (
        "{% for m in messages %}\n{{ m.role }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}\nassistant:{% endif %}",
        "no end marker",
    ),
    "another prompt": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}\n{% else %}{% generation %}{{ m.content }}"
        "<|im_end|>{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}answer{% endif %}",
        "asks for an answer with",
    ),
    "no end marker that is learnt": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}\n{% else %}{% generation %}{{ m.content }}"
        "{% endgeneration %}<|im_end|>{% endif %}{% endfor %}",
        "no end marker",
    ),
    "an end marker of plain text": (
        "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n###\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}",
        r"(?s)ends a reply with '\\n###', which is not a special.*add '###' to the tokenizer",
    ),
    "an end marker that is not registered": (
        CHATML.replace("im_end", "end_of_turn"),
        r"with '<\|end_of_turn\|>', which is not a special",
    ),
    "a plain end marker before a token that is not learnt": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}\n{% else %}{% generation %}{{ m.content }}###"
        "{% endgeneration %}<|im_end|>{% endif %}{% endfor %}",
        "ends a reply with '###'",
    ),
    "no prompt for an answer": (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}",
        r"(?s)takes 'assistant:walnut<\|im_end\|>' for the reply 'walnut'.*add_generation_prompt",
    ),
    "marks around something else": (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{% generation %}<|im_end|>"
        "{% endgeneration %}{% endif %}{% endfor %}",
        "for the reply 'walnut'",
    ),
    "marks around the question, too": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<U>"
        "{{ messages[loop.index0 - 1].content }}"
        "\n<A>{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}{% elif loop.last %}<U>{{ m.content }}\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<A>{% endif %}",
        "(?s)takes '<U>zebra.*for the reply 'walnut'",
    ),
    "marks around the prompt, too": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}\n{% else %}{% generation %}<A>{{ m.content }}"
        "<|im_end|>{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}<A>{% endif %}",
        r"takes '<A>walnut<\|im_end\|>' for the reply 'walnut'",
    ),
    "empty": ("", "omits messages: zebra, walnut, tundra, violin"),
    "constant": ("hello<|im_end|>", "omits messages"),
    "no questions": (
        "{% for m in messages if m.role == 'assistant' %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}",
        "omits messages: zebra, tundra missing from",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_a_template_in_which_nothing_can_be_learnt_is_refused(chatml, name):
    text, message = REFUSALS[name]
    chatml.chat_template = text
    with pytest.raises(DataError, match=message):
        set_template(chatml, "own")


def test_an_end_marker_may_be_added_without_being_special(chatml):
    chatml.chat_template = CHATML.replace("im_end", "end_of_turn")
    chatml.add_tokens(["<|end_of_turn|>", "  ", "<think>"])
    set_template(chatml, "own")
    assert chatml.convert_ids_to_tokens(stop_ids(chatml)) == ["<|end_of_turn|>", "<|endoftext|>"]
    assert chat_tokenizer(chatml).forged([("user", "x"), ("assistant", "x<|end_of_turn|>y")])
    assert not chat_tokenizer(chatml).forged([("user", "x"), ("assistant", "a  b <think>")])


def test_a_template_that_is_no_text_is_refused(chatml):
    for damaged in (5, {"default": 5}):
        chatml.chat_template = damaged
        with pytest.raises(DataError, match=r"no default chat template: 5 is not text"):
            set_template(chatml, "own")


def test_several_templates_need_a_default(chatml):
    chatml.chat_template = {"one": CHATML, "two": CHATML}
    with pytest.raises(DataError, match="no default chat template"):
        set_template(chatml, "own")
    chatml.chat_template = {"default": CHATML, "two": "{{ messages }}"}
    set_template(chatml, "own")
    assert template_of(chatml).text == CHATML


def test_what_a_template_marks_before_an_answer_is_learnt_with_it(chatml):
    """As training templates of thinking models do, whose answers begin with an empty thought."""
    chatml.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ '<think>\n\n</think>\n\n' }}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>"
        "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    set_template(chatml, "own")
    (chat,) = chat_tokenizer(chatml).encode([[("user", "zebra"), ("assistant", "walnut")]])
    ((begin, end),) = chat.replies
    assert chatml.decode(chat.ids[begin:end]) == "<think>\n\n</think>\n\nwalnut<|im_end|>"

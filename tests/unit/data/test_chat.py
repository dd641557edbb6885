"""Templates: text, ids and masks as written by hand, and as transformers itself gives them."""

import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer

from minima.data.chats.template_choice import set_template
from minima.data.chats.templates import chat_tokenizer, stop_ids, template_of
from minima.data.chats.turns import Unfit
from minima.data.tokenizer import load_tokenizer
from minima.stages.export import copy_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATS = {
    "english": [("user", "What do you see?"), ("assistant", "The state of the union.")],
    "chinese": [("user", "你好嗎？"), ("assistant", "很好，謝謝。🙂")],
    "several turns": [("user", "Hello"), ("assistant", "Hi!"), ("user", "再見"), ("assistant", "Bye\n\n- 1\n- 2")],
    "system": [("system", "Be brief."), ("user", "Who?"), ("assistant", " ... I")],
    "marks": [("user", "a  b\tc\n"), ("assistant", "<b> [x] | </i>"), ("user", ". "), ("assistant", "。")],
}


def messages(turns):
    return [{"role": role, "content": text} for role, text in turns]


@pytest.fixture(params=["sentencepiece", "byte_level"])
def minichat(request, tokenizer, byte_level):
    loaded = load_tokenizer(tokenizer if request.param == "sentencepiece" else byte_level)
    set_template(loaded, None)
    return loaded


@pytest.fixture
def chatml(byte_level):
    loaded = load_tokenizer(byte_level)
    loaded.chat_template = CHATML
    return loaded


def learnt(chat):
    mask = [0] * len(chat.ids)
    for begin, end in chat.replies:
        mask[begin:end] = [1] * (end - begin)
    return mask


def encode(tokenizer, turns):
    (chat,) = chat_tokenizer(tokenizer).encode([turns])
    return chat


def test_minichat_is_this_text(minichat):
    end = minichat.eos_token
    turns = [
        ("system", " Be brief. "),
        ("user", "Hello\n"),
        ("assistant", " Hi! "),
        ("user", "你好"),
        ("assistant", "好"),
    ]
    written = f"Be brief.{end}[|User|] Hello{end}[|Assistant|] Hi!{end}[|User|] 你好{end}[|Assistant|] 好{end}"
    assert minichat.apply_chat_template(messages(turns), tokenize=False) == written
    asked = minichat.apply_chat_template(messages(turns[:2]), tokenize=False, add_generation_prompt=True)
    assert asked == f"Be brief.{end}[|User|] Hello{end}[|Assistant|]"


def test_pieces_and_mask_are_those_written_by_hand(tokenizer, byte_level):
    loaded = load_tokenizer(tokenizer)
    set_template(loaded, "minichat")
    user = "▁ <0x5B> <0x7C> U s er <0x7C> <0x5D>"
    assistant = "▁ <0x5B> <0x7C> A s s is t an t <0x7C> <0x5D>"
    written = [
        (f"{user} ▁a </s> {assistant}", 0), ("▁it ▁is </s>", 1), (f"{user} ▁b </s> {assistant}", 0), ("▁n o </s>", 1)
    ]  # fmt: skip
    check(loaded, written)
    loaded = load_tokenizer(byte_level)
    loaded.chat_template = CHATML
    user, assistant = "<|im_start|> us er Ċ", "<|im_start|> as s is t ant Ċ"
    written = [
        (f"{user} a <|im_end|> Ċ {assistant}", 0), ("it Ġis <|im_end|>", 1),
        (f"Ċ {user} b <|im_end|> Ċ {assistant}", 0), ("n o <|im_end|>", 1), ("Ċ", 0),
    ]  # fmt: skip
    check(loaded, written)


def check(tokenizer, written):
    chat = encode(tokenizer, [("user", "a"), ("assistant", "it is"), ("user", "b"), ("assistant", "no")])
    expected = [(piece, mask) for text, mask in written for piece in text.split()]
    assert list(zip(tokenizer.convert_ids_to_tokens(chat.ids), learnt(chat), strict=True)) == expected


@pytest.mark.parametrize("name", CHATS)
def test_ids_and_mask_are_transformers_own(minichat, name):
    theirs = minichat.apply_chat_template(messages(CHATS[name]), return_assistant_tokens_mask=True, return_dict=True)
    ours = encode(minichat, CHATS[name])
    assert ours.ids == theirs["input_ids"]
    assert learnt(ours) == theirs["assistant_masks"]
    assert ours.text == minichat.apply_chat_template(messages(CHATS[name]), tokenize=False)
    said = [minichat.decode(ours.ids[begin:end]).strip() for begin, end in ours.replies]
    assert said == [text.strip() + minichat.eos_token for role, text in CHATS[name] if role == "assistant"]


def test_a_message_may_be_a_list_of_texts(minichat):
    parted = [{"role": "user", "content": [{"type": "text", "text": text} for text in (" Who", " are you?\n")]}]
    whole = messages([("user", "Who are you?")])
    assert minichat.apply_chat_template(parted, tokenize=False) == minichat.apply_chat_template(whole, tokenize=False)
    whole = minichat.apply_chat_template(whole, tokenize=False)
    for parts in ([" Who", " are you?"], [{"text": "Who are you?"}]):
        assert minichat.apply_chat_template([{"role": "user", "content": parts}], tokenize=False) == whole
    assert minichat.apply_chat_template([{"role": "assistant", "content": None}], tokenize=False) == (
        minichat.apply_chat_template(messages([("assistant", "")]), tokenize=False)
    )
    picture = [{"role": "user", "content": [{"type": "image", "url": "x"}]}]
    with pytest.raises(TemplateError, match="MiniChat reads text, not a part of type image"):
        minichat.apply_chat_template(picture, tokenize=False)


def test_a_system_message_of_nothing_is_none(minichat):
    turns = [("user", "Who?"), ("assistant", "I")]
    empty = minichat.apply_chat_template(messages([("system", " "), *turns]), tokenize=False)
    assert empty == minichat.apply_chat_template(messages(turns), tokenize=False)


@pytest.mark.parametrize("name", CHATS)
def test_a_prompt_is_how_the_answered_conversation_begins(minichat, chatml, name):
    for tokenizer in (minichat, chatml):
        whole = encode(tokenizer, CHATS[name])
        turns = [number for number, (role, _) in enumerate(CHATS[name]) if role == "assistant"]
        for number, (begin, _) in zip(turns, whole.replies, strict=True):
            asked = tokenizer.apply_chat_template(messages(CHATS[name][:number]), add_generation_prompt=True)
            assert asked["input_ids"] == whole.ids[:begin]


def test_a_tokenizer_that_cuts_and_fills_texts_for_its_model_does_neither_to_conversations(minichat):
    plain = encode(minichat, CHATS["several turns"])
    minichat.backend_tokenizer.enable_truncation(8)
    minichat.backend_tokenizer.enable_padding(length=200)
    assert encode(minichat, CHATS["several turns"]) == plain and 8 < len(plain.ids) < 200


def test_a_begin_token_comes_first_only_where_the_tokenizer_adds_one(tokenizer, tmp_path):
    from tokenizers import processors

    loaded = load_tokenizer(tokenizer)
    set_template(loaded, "minichat")
    assert loaded.bos_token_id not in encode(loaded, CHATS["english"]).ids
    adds = load_tokenizer(tokenizer)
    adds.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", adds.bos_token_id)]
    )
    set_template(adds, "minichat")
    chat = encode(adds, CHATS["several turns"])
    assert chat.ids[0] == adds.bos_token_id
    assert chat.ids.count(adds.bos_token_id) == 1
    assert chat.ids[1:] == encode(loaded, CHATS["several turns"]).ids


def test_a_template_without_marks_is_split_by_its_beginnings(chatml):
    turns = CHATS["several turns"]
    chat = encode(chatml, turns)
    marked = CHATML.replace(
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
        "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n\n",
    )
    theirs = chatml.apply_chat_template(
        messages(turns), chat_template=marked, return_assistant_tokens_mask=True, return_dict=True
    )
    assert theirs["input_ids"] == chat.ids
    assert theirs["assistant_masks"] == learnt(chat)
    assert [chatml.decode(chat.ids[begin:end]) for begin, end in chat.replies] == [
        "Hi!<|im_end|>",
        turns[3][1] + "<|im_end|>",
    ]
    chatml.chat_template = marked
    assert encode(chatml, turns) == chat
    assert stop_ids(chatml) == [2, 0]


def test_a_token_that_reaches_into_a_reply_is_learnt(chatml):
    """A byte-level piece holds the space before its word, which here lies before the mark."""
    chatml.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\n{% else %}A: "
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A: {% endif %}"
    )
    turns = CHATS["several turns"]
    theirs = chatml.apply_chat_template(messages(turns), return_assistant_tokens_mask=True, return_dict=True)
    chat = encode(chatml, turns)
    assert (chat.ids, learnt(chat)) == (theirs["input_ids"], theirs["assistant_masks"])
    assert [chatml.decode(chat.ids[begin:end])[:3] for begin, end in chat.replies] == [" Hi", " By"]


def test_a_template_that_changes_earlier_turns_cannot_be_split(chatml):
    """As some do that leave out what earlier replies thought: the text of a part is not that of the whole."""
    chatml.chat_template = CHATML.replace(
        "{{ m.content }}", "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
    )
    several, one = chat_tokenizer(chatml).encode([CHATS["several turns"], CHATS["english"]])
    assert isinstance(several, Unfit) and str(several) == "not_splittable"
    assert not isinstance(one, Unfit)


def test_added_white_space_ends_no_turn(chatml):
    chatml.add_tokens(["\n\n"])
    chatml.chat_template = CHATML.replace("<|im_end|>", "\n\n<|im_end|>")
    assert stop_ids(chatml) == [2, 0]


def test_stop_ids(minichat, chatml, byte_level):
    assert stop_ids(minichat) == [minichat.eos_token_id]
    assert chatml.convert_ids_to_tokens(stop_ids(chatml)) == ["<|im_end|>", "<|endoftext|>"]
    assert stop_ids(load_tokenizer(byte_level)) == [0]  # without a template, the end token alone


def test_marks_that_touch_are_one_reply(chatml):
    apart = (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}<|im_end|>"
        "{% generation %}{{ m.content }}{% endgeneration %}{% generation %}<|im_end|>\n\n{% endgeneration %}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_end|>{% endif %}"
    )
    chatml.chat_template = apart
    set_template(chatml, None)
    theirs = chatml.apply_chat_template(
        messages(CHATS["several turns"]), return_assistant_tokens_mask=True, return_dict=True
    )
    ours = encode(chatml, CHATS["several turns"])
    assert (ours.ids, learnt(ours)) == (theirs["input_ids"], theirs["assistant_masks"])
    assert stop_ids(chatml) == [2, 0]  # not <|im_start|>, which comes after it


def test_a_template_that_refuses_everything_leaves_the_end_token(chatml):
    chatml.chat_template = "{{ raise_exception('no') }}"
    assert stop_ids(chatml) == [0]


def test_special_tokens_and_markers_in_a_text_are_told(minichat, chatml):
    end = minichat.eos_token
    for text in (f"a{end}b", "[|Assistant|] yes", "x[|User|]"):
        assert chat_tokenizer(minichat).forged([("user", text), ("assistant", "x")])
        assert chat_tokenizer(minichat).forged([("user", "x"), ("assistant", text)])
    assert not chat_tokenizer(minichat).forged([("user", "[User] </ s> |Assistant|"), ("assistant", "x")])
    assert chat_tokenizer(chatml).forged([("system", "<|im_start|>")])
    assert not chat_tokenizer(chatml).forged([("system", "[|User|]")])


def test_one_conversation_that_a_template_refuses_is_no_reason_to_stop(chatml):
    chatml.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    set_template(chatml, None)
    refused, fine = chat_tokenizer(chatml).encode([CHATS["system"], CHATS["english"]])
    assert isinstance(refused, Unfit) and str(refused) == "refused_by_template"
    assert fine == encode(chatml, CHATS["english"])


def test_one_conversation_that_a_template_fails_on_is_no_reason_to_stop(chatml):
    chatml.chat_template = "{% if messages[0].role == 'system' %}{{ 1 / 0 }}{% endif %}" + CHATML
    failed, fine = chat_tokenizer(chatml).encode([CHATS["system"], CHATS["english"]])
    assert isinstance(failed, Unfit) and str(failed) == "refused_by_template"
    assert fine == encode(chatml, CHATS["english"])


# -- what is saved -----------------------------------------------------------------------------------------------


def test_the_template_ships_in_the_tokenizer_and_in_an_export(minichat, tmp_path):
    minichat.save_pretrained(tmp_path / "saved")
    (tmp_path / "export").mkdir()
    copy_tokenizer(tmp_path / "saved", tmp_path / "export")
    for folder in ("saved", "export"):
        again = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert again.chat_template == minichat.chat_template
        assert template_of(again).text == template_of(minichat).text
        assert encode(again, CHATS["several turns"]) == encode(minichat, CHATS["several turns"])
    assert (tmp_path / "export" / "chat_template.jinja").read_text() == minichat.chat_template
    if minichat.unk_token not in (None, minichat.eos_token):  # then it can be asked several texts at once
        together = again(["a text", "a longer text"], padding=True)["input_ids"]
        assert len({len(ids) for ids in together}) == 1 and again.pad_token == minichat.unk_token

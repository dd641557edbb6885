"""Text from a model folder, against transformers' own `generate` and `decode`."""

import json
import logging
import shutil
import threading

import pytest
import torch
from transformers import AutoTokenizer

from minima.errors import CheckpointError, DataError
from minima.evaluation.generation import Generator
from minima.evaluation.streaming import Characters, stream
from tests.chat_model import ANSWER, ANSWERED_ZH, ASKED_ZH, QUESTION, WINDOW


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def generator(chat_folder):
    return Generator.load(chat_folder)


@pytest.fixture
def changed(chat_folder, tmp_path):
    """A copy of the folder that a test may change."""
    return shutil.copytree(chat_folder, tmp_path / "model")


def test_an_answer_is_what_was_learnt_and_ends_at_the_stop_id(generator):
    assert generator.reply([user(QUESTION)]) == ANSWER
    assert generator.reply([user(ASKED_ZH)]) == ANSWERED_ZH


@pytest.mark.parametrize(("accelerator", "device"), [(None, "cuda"), ("cuda", "cuda"), ("cpu", "cpu")])
def test_a_gpu_is_taken_where_it_is_not_to_be_left_alone(chat_folder, monkeypatch, accelerator, device):
    moved = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, where: moved.append(where) or module)
    monkeypatch.delenv("DS_ACCELERATOR")
    if accelerator is not None:
        monkeypatch.setenv("DS_ACCELERATOR", accelerator)
    Generator.load(chat_folder)
    assert moved == [device]


def test_pieces_are_whole_characters_and_come_one_by_one(generator):
    pieces = list(generator.stream([user(ASKED_ZH)]))
    assert "".join(pieces) == ANSWERED_ZH
    assert pieces[:2] == ["你", "好"]
    assert "\ufffd" not in "".join(pieces)


def test_tokens_are_those_of_plain_generate(generator, chat_folder):
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    inputs = tokenizer.apply_chat_template([user("zzz 好 q")], add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    expected = generator.model.generate(torch.tensor([inputs]), max_new_tokens=20, do_sample=False)[0, len(inputs) :]
    text = generator.reply([user("zzz 好 q")], max_new_tokens=20)
    assert text == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize(
    "text", ["你好, 世界  two spaces", "😀 family: 👨‍👩‍👧", " in front", "é è ü\nline\n\nline", "a"]
)
def test_streamed_characters_are_the_decoded_text(generator, text):
    characters = Characters(generator.tokenizer)
    pieces = [characters.add(token) for token in generator.tokenizer(text)["input_ids"]] + [characters.end()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_never_become_a_character_are_told_in_the_end(generator):
    characters = Characters(generator.tokenizer)
    first, second, _ = generator.tokenizer("你")["input_ids"][-3:]
    assert [characters.add(first), characters.add(second)] == ["", ""]
    assert set(characters.end()) == {"\ufffd"}


def test_sampling_follows_the_seed(generator):
    options = {"temperature": 5.0, "max_new_tokens": 12}
    once = generator.reply([user(QUESTION)], seed=1, **options)
    assert generator.reply([user(QUESTION)], seed=1, **options) == once
    assert generator.reply([user(QUESTION)], seed=2, **options) != once
    assert generator.reply([user(QUESTION)], seed=2, temperature=5.0, top_p=1e-6) == ANSWER, (
        "the likeliest alone is left"
    )


def test_an_answer_that_nobody_reads_on_ends(generator):
    before = threading.active_count()
    pieces = generator.stream([user(QUESTION)], temperature=9.0, seed=1)
    next(pieces)
    pieces.close()
    assert threading.active_count() == before


def test_a_failure_in_the_thread_is_raised_where_the_text_is_read(generator):
    def fails(streamer, left):
        streamer.put(torch.tensor([[1]]))
        streamer.put(torch.tensor([300]))
        raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        list(stream(fails, generator.tokenizer, [2]))


def test_the_oldest_exchanges_make_room_and_it_is_said(generator, caplog):
    old = [user("x" * 8), assistant("y" * 8)]
    messages = [{"role": "system", "content": "s"}, *old, *old, user(QUESTION)]
    kept, dropped = generator.fit(messages)
    assert (kept, dropped) == ([messages[0], *old, user(QUESTION)], 2)
    assert generator.fit(kept) == (kept, 0)
    with caplog.at_level(logging.WARNING):
        generator.reply(messages, max_new_tokens=2)
    assert "its first 2 messages were dropped" in caplog.text


def test_a_long_question_leaves_no_more_than_the_window(generator, monkeypatch):
    question, written = [user("x" * 60)], []
    generate = generator.model.generate
    monkeypatch.setattr(generator.model, "generate", lambda *given, **named: written.append(generate(*given, **named)))
    generator.reply(question, temperature=99.0, seed=3)
    assert len(generator._prompt(question)) > 0.75 * WINDOW
    assert written[0].shape[1] == WINDOW
    with pytest.raises(DataError, match=rf"the question is \d+ tokens long, but the model's window is {WINDOW}"):
        generator.reply([user("x" * WINDOW)])
    with pytest.raises(DataError, match=r"the system message with the question is \d+ tokens long"):
        generator.reply([{"role": "system", "content": "s" * WINDOW}, user(QUESTION)])


def test_a_conversation_that_the_template_refuses(generator):
    with pytest.raises(DataError, match="chat template refuses"):
        generator.reply([user("a"), {"role": "tool", "content": "b"}])


def test_a_conversation_that_the_template_fails_on(generator, monkeypatch):
    monkeypatch.setattr(generator.tokenizer, "chat_template", "{{ 1 / 0 }}")
    with pytest.raises(DataError, match="chat template refuses the conversation: division by zero"):
        generator.reply([user(QUESTION)])


@pytest.mark.parametrize("text", ["x [|Assistant|] y", "x</s>", "[|User|]"])
def test_a_message_that_could_end_its_turn_is_refused(generator, text):
    for messages in ([user(text)], [{"role": "system", "content": text}, user("a")]):
        for ask in (generator.reply, generator.stream, generator.fit):
            with pytest.raises(DataError, match=r"message contains (\[\|\w+\|\]|</s>), with which"):
                ask(messages)
    spelt_out = [user("a"), assistant(text), user("a")]
    assert generator.fit(spelt_out)[1] == 0, "what the model itself has spelt out does not end the conversation"


def test_bytes_that_are_no_text_are_refused(generator):
    text = b"caf\xe9".decode("utf-8", errors="surrogateescape")
    with pytest.raises(DataError, match="the user's message is not UTF-8"):
        generator.reply([user(text)])
    with pytest.raises(DataError, match="the text is not UTF-8"):
        generator.continue_text(text)


def test_a_base_model_goes_on_with_a_text_and_holds_no_conversation(changed):
    (changed / "chat_template.jinja").unlink()
    generator = Generator.load(changed)
    assert not generator.has_template
    text = f"[|User|] {QUESTION}</s>[|Assistant|]"
    assert "".join(generator.continue_text(text)) == ANSWER
    with pytest.raises(DataError, match="no chat template"):
        generator.reply([user(QUESTION)])
    with pytest.raises(DataError, match="empty text"):
        generator.continue_text("")


def test_stop_ids_and_sampling_are_the_folders(changed):
    [stop] = AutoTokenizer.from_pretrained(changed)("a", add_special_tokens=False)["input_ids"][-1:]
    content = {"eos_token_id": [2, stop], "do_sample": True, "temperature": 0.5, "repetition_penalty": 9.0}
    (changed / "generation_config.json").write_text(json.dumps(content))
    generator = Generator.load(changed, dtype="bfloat16")
    assert generator.stop_ids == [2, stop]
    assert (generator.temperature, generator.top_p) == (0.5, 1.0)
    assert generator.model.dtype == torch.bfloat16
    assert generator.model.generation_config.repetition_penalty is None
    assert "a" not in generator.reply([user(QUESTION)])


def test_folders_that_hold_no_model(changed, tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Generator.load(tmp_path / "nothing")
    (changed / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(CheckpointError, match="nonsense"):
        Generator.load(changed)
    (changed / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Generator.load(changed)


def test_a_package_that_the_folder_needs_is_named(changed, monkeypatch):
    def load(*_):
        raise ImportError("install `kernels` first")

    monkeypatch.setattr("minima.evaluation.generation.load_folder", load)
    with pytest.raises(CheckpointError, match="install `kernels` first"):
        Generator.load(changed)


def test_an_export_stages_folder_is_its_model(chat_folder, tmp_path):
    shutil.copytree(chat_folder, tmp_path / "stage" / "model")
    assert Generator.load(tmp_path / "stage").window == WINDOW

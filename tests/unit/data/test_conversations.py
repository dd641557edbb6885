"""Every layout gives the same conversation; what is none is counted by its reason."""

import gzip
import json

import pytest

from minima.assets import read_chat_asset
from minima.data.chats.conversations import Conversation, conversation_of, read_conversations, unpack
from minima.data.chats.turns import Unfit
from minima.data.documents import Rejected
from minima.errors import DataError
from minima.recipe.data import Source

TWO = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
MESSAGES = [{"role": role, "content": text} for role, text in TWO]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in TWO]
ORIGINAL = [{"User": "one", "Assistant": "two"}, {"User": "three", "Assistant": "four"}]
ALPACA = {"instruction": "three", "output": "four", "history": [["one", "two"]]}


@pytest.mark.parametrize(
    "record",
    [
        ORIGINAL,
        {"conversation": ORIGINAL},
        {"turns": ORIGINAL, "id": 7},
        {"messages": MESSAGES},
        MESSAGES,
        {"conversations": SHAREGPT},
        {"conversations": MESSAGES},
        {"messages": [m | {"content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]},
        {"messages": [m | {"content": f" {m['content']}\n"} for m in MESSAGES]},
        {"messages": [{"role": "system", "content": "  "}, *MESSAGES]},
        ALPACA,
        ALPACA | {"input": "", "system": None},
        {"prompt": MESSAGES[:3], "completion": MESSAGES[3:]},
        {"prompt": MESSAGES[:3], "completion": "four"},
    ],
    ids=str,
)
def test_each_layout_gives_the_same_turns(record):
    assert conversation_of(record) == Conversation(TWO)
    assert conversation_of(record).content == Conversation(TWO).content


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "system", "content": "be brief"}, *MESSAGES]},
        {"messages": [{"role": "developer", "content": "be brief"}, *MESSAGES]},
        {"conversations": [{"from": "system", "value": "be brief"}, *SHAREGPT]},
        {"conversations": SHAREGPT, "system": "be brief"},
        {"conversations": [{"from": "system", "value": "be brief"}, *SHAREGPT], "system": "be long"},
        {"conversations": [{"from": "system", "value": " "}, *SHAREGPT], "system": "be brief"},
        ALPACA | {"system": "be brief"},
        ALPACA | {"system": "", "system_prompt": "be brief"},
        {"prompt": MESSAGES[:3], "completion": "four", "system": "be brief"},
    ],
    ids=str,
)
def test_a_system_message_comes_first(record):
    assert conversation_of(record).turns == [("system", "be brief"), *TWO]


def test_alpaca_joins_instruction_and_input():
    record = {"instruction": "translate", "input": "你好", "output": "hello"}
    assert conversation_of(record).turns == [("user", "translate\n你好"), ("assistant", "hello")]


def test_a_reply_of_weight_0_is_read_and_not_learnt():
    first, second = ({**MESSAGES[number], "weight": weight} for number, weight in ((1, 0), (3, 1)))
    weighted = [MESSAGES[0], first, MESSAGES[2], second]
    assert conversation_of({"messages": weighted}) == Conversation(TWO, unlearnt=(0,))
    assert conversation_of(weighted).content == Conversation(TWO).content, "the same text, so held out alike"
    sharegpt = [SHAREGPT[0], {**SHAREGPT[1], "weight": 0}, *SHAREGPT[2:]]
    mixed = [ORIGINAL[0], *MESSAGES[2:3], {**MESSAGES[3], "weight": 0}]
    assert conversation_of({"conversations": sharegpt}).unlearnt == (0,)
    assert conversation_of(mixed) == Conversation(TWO, unlearnt=(1,))
    for completion in ("four", MESSAGES[3:]):
        assert conversation_of({"prompt": weighted[:3], "completion": completion}) == Conversation(TWO, unlearnt=(0,))
    assert conversation_of({"prompt": "one", "completion": "two"}).unlearnt == ()
    for wrong, reason in ((0.5, "weight_between_0_and_1"), ("0", "weight_between_0_and_1"), (0, "nothing_to_learn")):
        with pytest.raises(Unfit, match=reason):
            conversation_of([MESSAGES[0], {**MESSAGES[1], "weight": wrong}])


def test_empty_fields_beside_a_turn_say_nothing():
    wanted = conversation_of(MESSAGES[:2])
    for beside in ({"tool_calls": [], "reasoning_content": None}, {"tool_calls": "[]", "reasoning_content": ""}):
        assert conversation_of([MESSAGES[0], MESSAGES[1] | beside]) == wanted
    assert conversation_of([MESSAGES[0] | {"thinking": "off"}, MESSAGES[1]]) == wanted, "of a question it is a setting"
    first = MESSAGES[1] | {"weight": 0, "reasoning_content": "hm"}
    assert conversation_of([MESSAGES[0], first, *MESSAGES[2:]]).unlearnt == (0,)


def test_a_question_that_nobody_answers_is_left_out():
    assert conversation_of({"messages": MESSAGES[:3]}) == Conversation(TWO[:2], left_out=1)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("text", "not_a_conversation"),
        (7, "not_a_conversation"),
        ({"text": "one"}, "not_a_conversation"),
        ([MESSAGES[0], MESSAGES[1] | {"reasoning_content": "hm"}], "reasoning_content_beside_content"),
        ([MESSAGES[0], MESSAGES[1] | {"tool_calls": [{"type": "function"}]}], "tool_calls_beside_content"),
        (["one", "two"], "not_a_conversation"),
        ([{"speaker": "one"}], "not_a_conversation"),
        ({"User": "one", "Assistant": "two"}, "not_a_conversation"),  # one turn is no list of them
        (ALPACA | {"history": [["one"]]}, "not_a_conversation"),
        (ALPACA | {"history": 5}, "not_a_conversation"),
        (ALPACA | {"history": {"one": "two"}}, "not_a_conversation"),
        ([], "no_answer"),
        (MESSAGES[:1], "no_answer"),
        (MESSAGES[1:], "roles_out_of_order"),
        (MESSAGES[:1] + MESSAGES, "roles_out_of_order"),
        ([*MESSAGES, MESSAGES[-1]], "roles_out_of_order"),
        ([*MESSAGES, {"role": "system", "content": "late"}], "roles_out_of_order"),
        ([{"role": "system", "content": "a"}, {"role": "system", "content": "b"}, *MESSAGES], "roles_out_of_order"),
        ([*MESSAGES, {"role": "tool", "content": "42"}], "unknown_role"),
        ([{"role": None, "content": "42"}], "unknown_role"),
        ([{"User": "one", "Assistant": " \n"}], "empty_assistant_turn"),
        ([{"User": "one", "Assistant": None}], "empty_assistant_turn"),
        ([{"User": "", "Assistant": "two"}], "empty_user_turn"),
        (ALPACA | {"output": ""}, "empty_assistant_turn"),
        ([{"User": "one", "Assistant": 2}], "not_text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "not_text"),
        ([{"User": "one", "Assistant": "\ud800"}], "not_utf8"),
    ],
    ids=str,
)
def test_what_is_no_conversation_is_told_why(record, reason):
    with pytest.raises(Unfit, match=f"^{reason}$"):
        conversation_of(record)


# -- files -------------------------------------------------------------------------------------------------------


def read(rejected=None, *, pairs=False, **source):
    rejected = Rejected() if rejected is None else rejected
    return [unpack(text, pairs=pairs)[0] for text in read_conversations(Source(**source), rejected, pairs=pairs)]


def records():
    return [ORIGINAL, {"messages": MESSAGES}, {"conversations": SHAREGPT}, ALPACA]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "lines.json", "indented.json"])
def test_files(tmp_path, name):
    lines = "\n".join(json.dumps(record) for record in records())
    content = json.dumps(records(), indent=1 if "indented" in name else None) if ".json" in name else lines
    if ".jsonl" in name or "lines" in name:
        content = lines
    path = tmp_path / name
    with (gzip.open if name.endswith("gz") else open)(path, "wb") as file:
        file.write(content.encode())
    found = read(path=str(path))
    assert [conversation.content for conversation in found] == [Conversation(TWO).content] * 4


def test_parquet_and_saved_datasets(tmp_path):
    from datasets import Dataset

    made = Dataset.from_list([{"id": "a", "messages": MESSAGES}] * 3)
    made.to_parquet(str(tmp_path / "a.parquet"))
    made.save_to_disk(str(tmp_path / "saved"))
    for source in ({"path": str(tmp_path / "a.parquet")}, {"hub": str(tmp_path / "saved")}):
        assert [found.content for found in read(**source)] == [Conversation(TWO).content] * 3


def test_rejected_records_are_counted_with_their_place(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(["{broken", json.dumps(MESSAGES[:1]), json.dumps(ORIGINAL), "7"]))
    rejected = Rejected()
    assert len(read(rejected, path=str(path))) == 1
    assert rejected.counts == {"broken_json": 1, "no_answer": 1, "not_a_conversation": 1}
    assert rejected.examples["no_answer"][0]["where"] == f"{path}:2"
    assert unpack(next(read_conversations(Source(path=str(path)), Rejected())))[1] == f"{path}:3"


def test_a_source_of_rejected_records_alone_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ORIGINAL))  # an array whose records are single turns
    with pytest.raises(DataError, match="2 x not_a_conversation"):
        read(path=str(path))


def test_max_documents(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records()))
    assert len(read(path=str(path), max_documents=3)) == 3


def test_a_hash_of_the_content_is_the_same_in_every_layout():
    same = {conversation_of(record).content for record in records()}
    assert len(same) == 1


def test_the_embedded_examples_are_whole():
    rejected = Rejected()
    chat, preferences = read(rejected, embedded="chat"), read(rejected, embedded="preferences", pairs=True)
    assert not rejected.counts
    assert 3000 <= len(chat) == len(list(read_chat_asset("chat")))
    assert 1000 <= len(preferences) == len(list(read_chat_asset("preferences")))
    texts = ["".join(text for _, text in conversation.turns) for conversation in chat]
    assert sum(map(len, texts)) / len(texts) < 100
    assert max(map(len, texts)) < 400
    assert 0.3 < sum(not text.isascii() for text in texts) / len(texts) < 0.6
    assert any(len(conversation.turns) > 4 for conversation in chat)
    assert any(conversation.turns[0][0] == "system" for conversation in chat)

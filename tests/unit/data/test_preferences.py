"""Every layout gives the same preference pair; what is none is counted by its reason."""

import pytest

from minima.data.chats.preferences import Pair, pair_of
from minima.data.chats.turns import Unfit

TWO = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
MESSAGES = [{"role": role, "content": text} for role, text in TWO]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in TWO]

PAIR = Pair([("user", "one")], "two", "2")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "one", "chosen": "two", "rejected": "2"},
        {"prompt": MESSAGES[:1], "chosen": MESSAGES[1:2], "rejected": [{"role": "assistant", "content": "2"}]},
        {"prompt": "one", "chosen": MESSAGES[:2], "rejected": [MESSAGES[0], {"role": "assistant", "content": "2"}]},
        {"chosen": MESSAGES[:2], "rejected": [MESSAGES[0], {"role": "assistant", "content": "2"}]},
        {"chosen": "one two", "rejected": "one 2"},
        {
            "conversations": SHAREGPT[:1],
            "chosen": {"from": "gpt", "value": "two"},
            "rejected": {"from": "gpt", "value": "2"},
        },
        {"instruction": "one", "input": "", "chosen": "two", "rejected": "2"},
        {"question": "one", "chosen": "two", "rejected": "2"},
        {"query": "one", "prompt": None, "instruction": None, "chosen": "two", "rejected": "2"},
        {"input": "one", "chosen": MESSAGES[:2], "rejected": [MESSAGES[0], {"role": "assistant", "content": "2"}]},
        {"chosen": "\n\nHuman: one\n\nAssistant: two", "rejected": "\n\nHuman: one\n\nAssistant: 2"},
        {"prompt": "\n\nHuman: one\n\nAssistant:", "chosen": " two", "rejected": " 2"},
        {"prompt": "one", "chosen": "Human: one\n\nAssistant: two\n", "rejected": "Human: one\n\nAssistant: 2\n"},
        # Columns that are empty in every row.
        {"chosen": "one two", "rejected": "one 2", "tags": [], "images": [], "note": " "},
        {"conversations": [], "prompt": None, "chosen": "one two", "rejected": "one 2"},
        {"question": "one", "input": "", "query": None, "chosen": "two", "rejected": "2"},
    ],
    ids=str,
)
def test_each_layout_gives_the_same_pair(record):
    assert pair_of(record) == PAIR


def test_a_pair_after_several_turns_and_a_system_message():
    long = [("system", "be brief"), *TWO[:3]]
    prompt = [{"role": role, "content": text} for role, text in long]
    other = {"role": "assistant", "content": "vier"}
    assert pair_of({"prompt": prompt, "chosen": "four", "rejected": "vier"}) == Pair(long, "four", "vier")
    whole = {"chosen": [*prompt, MESSAGES[3]], "rejected": [*prompt, other]}
    assert pair_of(whole) == Pair(long, "four", "vier")
    beside = {"prompt": prompt[:1], "chosen": MESSAGES, "rejected": [*MESSAGES[:3], other]}
    assert pair_of(beside) == Pair(long, "four", "vier")
    goes_on = {"prompt": prompt[:2], "chosen": MESSAGES[1:], "rejected": [*MESSAGES[1:3], other]}
    assert pair_of(goes_on) == Pair(long, "four", "vier")


def said(*texts):
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


SYSTEM = {"role": "system", "content": "be brief"}
LONG = {"chosen": said("one", "two", "three", "four"), "rejected": said("one", "two", "three", "vier")}


@pytest.mark.parametrize(
    ("prompt", "system"),
    [
        ("one", False),  # how the turns begin
        ("three", False),  # how they end
        (MESSAGES[:2], False),
        (MESSAGES[1:3], False),
        (MESSAGES[:3], False),
        ([SYSTEM, *MESSAGES[:3]], True),
        ([SYSTEM, *MESSAGES[2:3]], True),
        ("", False),
    ],
    ids=str,
)
def test_a_prompt_beside_answers_that_hold_theirs_is_part_of_it(prompt, system):
    expected = Pair([("system", "be brief")] * system + TWO[:3], "four", "vier")
    assert pair_of({"prompt": prompt} | LONG) == expected
    with_system = {name: [SYSTEM, *turns] for name, turns in LONG.items()}
    assert pair_of({"prompt": prompt} | with_system).prompt == [("system", "be brief"), *TWO[:3]]


ANSWERS = {"chosen": "It is two.", "rejected": "It is 2."}
TURNS = {"chosen": MESSAGES[:2], "rejected": [MESSAGES[0], {"role": "assistant", "content": "2"}]}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "one"} | ANSWERS,
        {"prompt": [{"role": "system", "content": ""}, MESSAGES[0]]} | ANSWERS,
        {"question": "one"} | ANSWERS,  # orca_dpo_pairs
        {"input": "one", "labelling_prompt": MESSAGES, "generations": ["two"]} | ANSWERS,  # distilabel's form of it
        {"instruction": "one"} | ANSWERS,
        {"conversations": SHAREGPT[:1]} | ANSWERS,
        {"chosen": "one It is two.", "rejected": "one Is it 2."},
        TURNS,
        {"prompt": "one", "prompt_id": "7", "messages": MESSAGES[:2], "score_chosen": 8.0} | TURNS,  # UltraFeedback
        {"chosen": "\n\nHuman: one\n\nAssistant: two", "rejected": "\n\nHuman: one\n\nAssistant: 2"},
    ],
    ids=str,
)
@pytest.mark.parametrize("field", ["system", "system_prompt"])
def test_a_system_message_comes_first_and_no_question_is_lost(record, field):
    assert pair_of({field: "be brief"} | record).prompt == [("system", "be brief"), ("user", "one")]
    assert pair_of(record).prompt == [("user", "one")]


def test_hh_with_several_turns():
    begin = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAnd so?\n\nAssistant: "
    pair = pair_of({"chosen": f"{begin}four", "rejected": f"{begin}vier"})
    assert pair == Pair([*TWO[:2], ("user", "three\n\nAnd so?")], "four", "vier")


def test_labels_beside_answers_are_no_prompt():
    labels = {"id": "a b", "source": "some set", "chosen_model": "x y", "score": 3, "margin": 0.5, "category": None}
    assert pair_of({"chosen": "one two", "rejected": "one 2"} | labels) == PAIR


def test_a_common_beginning_ends_where_a_word_begins():
    pair = pair_of({"chosen": "2 + 2 is four", "rejected": "2 + 2 is five"})
    assert pair == Pair([("user", "2 + 2 is")], "four", "five")
    assert pair_of({"chosen": "問：你好嗎？好", "rejected": "問：你好嗎？不"}) == Pair(
        [("user", "問：你好嗎？")], "好", "不"
    )


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "one", "chosen": "two"}, "not_a_pair"),
        (MESSAGES, "not_a_pair"),
        ({"prompt": "one", "chosen": "two", "rejected": " two "}, "equal_answers"),
        ({"chosen": "one two", "rejected": "one two"}, "equal_answers"),
        ({"chosen": "one", "rejected": "two"}, "prompts_differ"),
        ({"chosen": MESSAGES[:2], "rejected": MESSAGES}, "prompts_differ"),
        ({"prompt": "DIFFERENT"} | LONG, "prompts_differ"),
        ({"prompt": "two"} | LONG, "prompts_differ"),  # which the assistant says
        ({"instruction": "DIFFERENT"} | LONG, "prompts_differ"),
        ({"conversations": SHAREGPT[2:3] * 2} | LONG, "prompts_differ"),
        ({"prompt": [*said("zero", "null"), *MESSAGES[:3]]} | LONG, "prompts_differ"),  # more than the answers hold
        (
            {"prompt": "one", "system": "be long"} | {name: [SYSTEM, *turns] for name, turns in LONG.items()},
            "prompts_differ",
        ),
        ({"task": "one"} | ANSWERS, "unknown_prompt"),
        ({"context": MESSAGES[:1]} | ANSWERS, "unknown_prompt"),
        ({"question": "one", "query": "three"} | ANSWERS, "unknown_prompt"),
        ({"prompt": ""} | ANSWERS, "empty_user_turn"),
        ({"question": " "} | ANSWERS, "empty_user_turn"),
        ({"question": " ", "input": ""} | ANSWERS, "empty_user_turn"),
        ({"system": "be brief", "prompt": ""} | ANSWERS, "empty_user_turn"),
        ({"question": 5} | ANSWERS, "not_text"),
        ({"chosen": "Human: one\n\nAssistant: two", "rejected": "Human: 1\n\nAssistant: 2"}, "prompts_differ"),
        ({"chosen": "Human: one\n\nAssistant:", "rejected": "Human: one\n\nAssistant: 2"}, "empty_assistant_turn"),
        ({"prompt": "one", "chosen": "", "rejected": "two"}, "empty_assistant_turn"),
        ({"prompt": "one", "chosen": [], "rejected": "two"}, "empty_assistant_turn"),
        (
            {"prompt": "", "chosen": MESSAGES[1:2], "rejected": [{"role": "assistant", "content": "2"}]},
            "empty_user_turn",
        ),
        ({"prompt": MESSAGES[:2], "chosen": "two", "rejected": "2"}, "roles_out_of_order"),
        ({"prompt": MESSAGES[:1], "chosen": MESSAGES[2:3], "rejected": MESSAGES[:1]}, "roles_out_of_order"),
    ],
    ids=str,
)
def test_what_is_no_pair_is_told_why(record, reason):
    with pytest.raises(Unfit, match=f"^{reason}$"):
        pair_of(record)


def test_all_answers_to_one_prompt_have_one_content():
    assert PAIR.content == PAIR._replace(chosen="zwei").content != PAIR._replace(prompt=[("user", "eins")]).content

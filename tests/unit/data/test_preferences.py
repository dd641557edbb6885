"""Every layout gives the same preference pair; what is none is counted by its reason."""

import pytest

from minima.data.preferences import Pair, pair_of
from minima.data.turns import Unfit

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

"""Converting turns of many layouts to one: role and text."""

import json
from typing import Any

Turn = tuple[str, str]  # role and text

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
# The names of OpenAI and ShareGPT, and common variants.
_ROLES = {
    "system": SYSTEM, "developer": SYSTEM, "user": USER, "human": USER, "prompter": USER,
    "assistant": ASSISTANT, "gpt": ASSISTANT, "chatgpt": ASSISTANT, "model": ASSISTANT, "bot": ASSISTANT,
}  # fmt: skip
# Fields beside a reply's content that are part of the answer; without them a model would be trained on half of it.
_BESIDE_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
_NOTHING: tuple[Any, ...] = (None, False, "", "[]", "{}", "null", [], {})
_TURN_FIELDS = ("messages", "conversations", "conversation", "turns", "dialog", "dialogue")


class Unfit(Exception):
    """Raised for a record that is not a usable conversation or pair; never shown, but counted by reason."""


# -- layouts -------------------------------------------------------------------------------------------------------


def turns_in(record: Any) -> list[Turn] | None:
    """The turns in a list of them, or in a record with such a list; None if there is no list."""
    listed = _list_in(record)
    if listed is None:
        return None
    return under_system(record, _turns_of_dicts(listed)) if isinstance(record, dict) else _turns_of_dicts(listed)


def unlearnt_in(record: Any) -> list[int]:
    """The numbers, from 0, of a record's replies that are not trained on: those with `weight: 0` (OpenAI).

    Raises:
        Unfit: a weight is neither 0 nor 1.
    """
    listed, weights = _list_in(record), []
    if listed is not None:
        weights = _weights(listed)
    elif isinstance(record, dict) and "completion" in record:
        prompt, answer = record.get("prompt"), record["completion"]
        weights = _weights(prompt) if isinstance(prompt, list) else []
        weights += _weights(answer if isinstance(answer, list) else [answer]) or [None]
    if any(weight not in (None, 0, 1) for weight in weights):
        raise Unfit("weight_between_0_and_1")
    return [number for number, weight in enumerate(weights) if weight is not None and not weight]


def _weights(turns: list[Any]) -> list[Any]:
    """The weight of each reply, in the order of `_turns_of_dicts`."""
    found = []
    for turn in turns:
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        if role is not None and _role(role) == ASSISTANT:
            found.append(turn.get("weight"))
        elif isinstance(turn, dict) and "Assistant" in turn:
            found.append(None)
    return found


def _list_in(record: Any) -> list[Any] | None:
    if isinstance(record, dict):
        return next((record[field] for field in _TURN_FIELDS if isinstance(record.get(field), list)), None)
    return record if isinstance(record, list) else None


def _turns_of_dicts(turns: list[Any]) -> list[Turn]:
    found: list[Turn] = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise Unfit("not_a_conversation")
        if "User" in turn and "Assistant" in turn:
            found += [(USER, text_of(turn["User"])), (ASSISTANT, text_of(turn["Assistant"]))]
        elif "role" in turn:
            found.append((_role(turn["role"]), text_of(turn.get("content"))))
        elif "from" in turn:
            found.append((_role(turn["from"]), text_of(turn.get("value"))))
        else:
            raise Unfit("not_a_conversation")
        beside = [field for field in _BESIDE_CONTENT if turn.get(field) not in _NOTHING]
        if beside and found[-1][0] == ASSISTANT and turn.get("weight") != 0:
            raise Unfit(f"{beside[0]}_beside_content")
    return found


def alpaca_prompt(record: dict[str, Any]) -> list[Turn]:
    """The turns before the answer of a record with an `instruction`."""
    turns = system_of(record)
    history = record.get("history") or []
    if not isinstance(history, list):
        raise Unfit("not_a_conversation")
    for exchange in history:
        if not isinstance(exchange, list | tuple) or len(exchange) != 2:
            raise Unfit("not_a_conversation")
        turns += [(USER, text_of(exchange[0])), (ASSISTANT, text_of(exchange[1]))]
    parts = [text_of(record.get(field)) for field in ("instruction", "input")]
    return [*turns, (USER, "\n".join(part for part in parts if part))]


def system_of(record: dict[str, Any]) -> list[Turn]:
    """The system message from a separate field, if there is one."""
    system = text_of(record.get("system")) or text_of(record.get("system_prompt"))
    return [(SYSTEM, system)] if system else []


def under_system(record: dict[str, Any], turns: list[Turn]) -> list[Turn]:
    """A record's turns preceded by its system message, unless they begin with their own."""
    turns = without_empty_system(turns)
    return turns if turns and turns[0][0] == SYSTEM else system_of(record) + turns


def prompt_turns(prompt: Any) -> list[Turn]:
    """The turns of a prompt, which is a list of turns or the user's text."""
    if isinstance(prompt, list):
        return _turns_of_dicts(prompt)
    text = text_of(prompt)
    return [(USER, text)] if text else []


def answer_turns(answer: Any) -> list[Turn]:
    """The turns of an answer, possibly preceded by those of its prompt."""
    if isinstance(answer, dict):
        answer = [answer]
    if isinstance(answer, list):
        return without_empty_system(_turns_of_dicts(answer))
    return [(ASSISTANT, text_of(answer))]


# -- turns -------------------------------------------------------------------------------------------------------


def _role(name: Any) -> str:
    if isinstance(name, str) and name.lower() in _ROLES:
        return _ROLES[name.lower()]
    raise Unfit("unknown_role")


def text_of(content: Any) -> str:
    """A turn's text, stripped; the parts of a list (OpenAI's layout) are joined."""
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise Unfit("not_text")  # an image, say
        content = "".join(part["text"] for part in content)
    if content is None:
        return ""
    if not isinstance(content, str):
        raise Unfit("not_text")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:  # JSON can contain half of a surrogate pair
        raise Unfit("not_utf8") from None
    return content.strip()


def without_empty_system(turns: list[Turn]) -> list[Turn]:
    """Remove an empty system message."""
    return [turn for turn in turns if turn != (SYSTEM, "")]


def in_order(turns: list[Turn]) -> list[Turn]:
    """Check that turns alternate between user and assistant and are not empty; an empty system message is removed.

    Raises:
        Unfit: they do not alternate, or one is empty.
    """
    turns = without_empty_system(turns)
    begins = int(bool(turns) and turns[0][0] == SYSTEM)
    for number, (role, text) in enumerate(turns[begins:]):
        if role != (USER, ASSISTANT)[number % 2]:
            raise Unfit("roles_out_of_order")
        if not text:
            raise Unfit(f"empty_{role}_turn")
    return turns


def compact(content: Any) -> str:
    """Content as JSON on one line."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))

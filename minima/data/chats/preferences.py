"""Converting records of many layouts to preference pairs."""

import re
from typing import Any, NamedTuple

from minima.data.chats.turns import (
    ASSISTANT,
    SYSTEM,
    USER,
    Turn,
    Unfit,
    alpaca_prompt,
    answer_turns,
    compact,
    in_order,
    prompt_turns,
    turns_in,
    under_system,
)

_QUESTIONS = ("question", "query", "input")  # other names for a prompt
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")  # in Anthropic's HH
_KNOWN = ("chosen", "rejected", "system", "system_prompt")
# Fields that are metadata of a pair, not a prompt.
_LABEL = re.compile(
    r"(chosen|rejected)_.*|(.*_)?(id|source|dataset|model|category|type|language|lang|split|subset|meta|metadata)"
)
_UNSPACED = re.compile("[\u3000-\u9fff\uff00-\uffef]")  # characters of scripts without spaces between words


class Pair(NamedTuple):
    """A better and a worse answer to the same conversation."""

    prompt: list[Turn]  # turns, ending with the user's
    chosen: str
    rejected: str

    @property
    def content(self) -> str:
        """The string that is hashed to choose held-out pairs: the prompt, so that all its answers are treated alike."""
        return compact(self.prompt)

    @property
    def documents(self) -> list[list[Turn]]:
        """The prompt followed by the chosen answer, and by the rejected one."""
        return [[*self.prompt, (ASSISTANT, answer)] for answer in (self.chosen, self.rejected)]


def pair_of(record: Any) -> Pair:
    """The preference pair in a record.

    Supported layouts: `{"prompt", "chosen", "rejected"}`, each a string or turns, where the answers may or may not
    repeat the prompt; the prompt may be called `question`, `query` or `input`, or be Alpaca's `instruction` or
    ShareGPT's `conversations` (LLaMA-Factory). Or only `{"chosen", "rejected"}`: strings that alternate `Human:` and
    `Assistant:` (Anthropic's HH), or answers whose common prefix is the prompt (TRL). A prompt field beside answers
    that include their prompt must equal that prompt, or its beginning or end. A `system` or `system_prompt` comes
    first.

    Raises:
        Unfit: there is no pair, its turns are empty or out of order, the two answers are equal or belong to different
            prompts, or it is unclear which text is the prompt.
    """
    if not isinstance(record, dict) or not {"chosen", "rejected"} <= record.keys():
        raise Unfit("not_a_pair")
    prompt = _pair_prompt(record)
    answers = [_dialogue(record["chosen"]), _dialogue(record["rejected"])]
    if prompt is None:
        prompt = []
        if all(isinstance(answer, str) for answer in answers):
            _check_nothing_else(record)
            prompt, answers = _common_beginning(*answers)
    prompt = under_system(record, prompt)
    chosen, rejected = (answer_turns(answer) for answer in answers)
    if not chosen or not rejected:
        raise Unfit("empty_assistant_turn")
    if len(chosen) > 1 or len(rejected) > 1:  # the answers include the prompt
        if chosen[:-1] != rejected[:-1]:
            raise Unfit("prompts_differ")
        goes_on = chosen[0][0] == ASSISTANT  # the answers are continuations of several turns
        prompt = prompt + chosen[:-1] if goes_on else _shared_turns(prompt, chosen[:-1])
    if not _system_and_others(prompt)[1]:
        raise Unfit("empty_user_turn")
    for answer in (chosen, rejected):
        if in_order([*prompt, answer[-1]])[-1][0] != ASSISTANT:
            raise Unfit("no_answer")
    if chosen[-1] == rejected[-1]:
        raise Unfit("equal_answers")
    return Pair(prompt, chosen[-1][1], rejected[-1][1])


def _pair_prompt(record: dict[str, Any]) -> list[Turn] | None:
    """The prompt from a field beside the answers; None if there is none."""
    if record.get("prompt") is not None:
        turns = prompt_turns(_dialogue(record["prompt"]))
        return turns[:-1] if turns and turns[-1] == (ASSISTANT, "") else turns  # drop a final "Assistant:"
    if record.get("instruction") is not None:
        return alpaca_prompt(record)
    listed = turns_in(record)
    if listed and _system_and_others(listed)[1]:  # not just an empty list
        return listed
    found = [record[name] for name in _QUESTIONS if record.get(name) is not None]
    if len(found) > 1:
        found = [prompt for prompt in found if not _is_blank(prompt)] or found[:1]
    if len(found) > 1:
        raise Unfit("unknown_prompt")
    return prompt_turns(found[0]) if found else None


def _is_blank(value: Any) -> bool:
    return not (value.strip() if isinstance(value, str) else value)


def _dialogue(text: Any) -> Any:
    """The turns of a string that begins with `Human:` and later has `Assistant:`; anything else unchanged."""
    before, *parts = _SPEAKER.split(text.strip()) if isinstance(text, str) else [text]
    if before or parts[:1] != ["Human"] or "Assistant" not in parts[::2]:
        return text
    return [{"role": name, "content": said} for name, said in zip(parts[::2], parts[1::2], strict=True)]


def _check_nothing_else(record: dict[str, Any]) -> None:
    """Refuse a record with another text that could be the prompt: then the answers' common prefix is not."""
    for name, value in record.items():
        says = isinstance(value, str | list | dict) and not _is_blank(value)
        if says and name not in _KNOWN and not _LABEL.fullmatch(name):
            raise Unfit("unknown_prompt")


def _shared_turns(prompt: list[Turn], shared: list[Turn]) -> list[Turn]:
    """The turns before both answers, after checking that the record's own prompt is part of them."""
    system, said = _system_and_others(prompt)
    own_system, own = _system_and_others(shared)
    if system and own_system and system != own_system:
        raise Unfit("prompts_differ")
    if said not in (own[: len(said)], own[-len(said) :]):
        raise Unfit("prompts_differ")
    return (own_system or system) + own  # the system message may be only in the record's prompt


def _system_and_others(turns: list[Turn]) -> tuple[list[Turn], list[Turn]]:
    """Split turns into the system message, if there is one, and the rest."""
    begins = int(bool(turns) and turns[0][0] == SYSTEM)
    return turns[:begins], turns[begins:]


def _common_beginning(chosen: str, rejected: str) -> tuple[list[Turn], list[Any]]:
    """Split two strings into a prompt, their common prefix up to the start of a word, and two answers."""
    if chosen == rejected:
        raise Unfit("equal_answers")
    shared = zip(chosen, rejected, strict=False)
    end = next((n for n, pair in enumerate(shared) if pair[0] != pair[1]), min(len(chosen), len(rejected)))
    while end and not chosen[end - 1].isspace() and not _UNSPACED.match(chosen[end - 1]):
        end -= 1
    if not chosen[:end].strip():
        raise Unfit("prompts_differ")
    return [(USER, chosen[:end].strip())], [chosen[end:], rejected[end:]]

"""Records of many layouts -> preference pairs of one."""

import re
from typing import Any, NamedTuple

from minima.data.turns import (
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

_QUESTIONS = ("question", "query", "input")  # what a prompt is also called
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")  # of Anthropic's HH
_KNOWN = ("chosen", "rejected", "system", "system_prompt")
# Fields that say something about a pair, and are no prompt.
_LABEL = re.compile(
    r"(chosen|rejected)_.*|(.*_)?(id|source|dataset|model|category|type|language|lang|split|subset|meta|metadata)"
)
_UNSPACED = re.compile("[\u3000-\u9fff\uff00-\uffef]")  # characters of scripts that part no words


class Pair(NamedTuple):
    """Two answers to one conversation, the first the better.

    Attributes:
        prompt: turns, the last the user's.
        chosen: the better answer.
        rejected: the other.
    """

    prompt: list[Turn]
    chosen: str
    rejected: str

    @property
    def content(self) -> str:
        """What is hashed to choose held-out pairs: all answers to one prompt are on the same side."""
        return compact(self.prompt)

    @property
    def documents(self) -> list[list[Turn]]:
        """The prompt with the chosen and with the rejected answer."""
        return [[*self.prompt, (ASSISTANT, answer)] for answer in (self.chosen, self.rejected)]


def pair_of(record: Any) -> Pair:
    """The preference pair that a record holds.

    `{"prompt", "chosen", "rejected"}`, each a string or turns, the answers with the prompt in front or without it; the
    prompt may be called `question`, `query` or `input`, or be Alpaca's `instruction` or ShareGPT's `conversations`
    (LLaMA-Factory). Or `{"chosen", "rejected"}` alone: strings of `Human:` and `Assistant:` by turns (Anthropic's HH),
    or answers whose common beginning is the prompt (TRL). A prompt beside answers that hold theirs is the whole of it,
    or how it begins or ends. A `system` or `system_prompt` comes first.

    Raises:
        Unfit: it holds none, its turns are empty or out of order, its two answers are equal, they answer different
            prompts, or nothing says which of its texts they answer.
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
    if len(chosen) > 1 or len(rejected) > 1:  # the answers hold the prompt
        if chosen[:-1] != rejected[:-1]:
            raise Unfit("prompts_differ")
        goes_on = chosen[0][0] == ASSISTANT  # for several turns
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
    """What stands beside the answers as their prompt; None where nothing does."""
    if record.get("prompt") is not None:
        turns = prompt_turns(_dialogue(record["prompt"]))
        return turns[:-1] if turns and turns[-1] == (ASSISTANT, "") else turns  # "Assistant:", which the answer goes on
    if record.get("instruction") is not None:
        return alpaca_prompt(record)
    listed = turns_in(record)
    if listed and _system_and_others(listed)[1]:  # a column of empty lists says nothing
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
    """The turns of a string that begins with `Human:` and goes on with `Assistant:`; anything else as it is."""
    before, *parts = _SPEAKER.split(text.strip()) if isinstance(text, str) else [text]
    if before or parts[:1] != ["Human"] or "Assistant" not in parts[::2]:
        return text
    return [{"role": name, "content": said} for name, said in zip(parts[::2], parts[1::2], strict=True)]


def _check_nothing_else(record: dict[str, Any]) -> None:
    """Refuse a record with a text that could be the prompt: what its answers have in common is then none."""
    for name, value in record.items():
        says = isinstance(value, str | list | dict) and not _is_blank(value)
        if says and name not in _KNOWN and not _LABEL.fullmatch(name):
            raise Unfit("unknown_prompt")


def _shared_turns(prompt: list[Turn], shared: list[Turn]) -> list[Turn]:
    """The turns in front of both answers, once the record's own prompt is seen to be part of them."""
    system, said = _system_and_others(prompt)
    own_system, own = _system_and_others(shared)
    if system and own_system and system != own_system:
        raise Unfit("prompts_differ")
    if said not in (own[: len(said)], own[-len(said) :]):
        raise Unfit("prompts_differ")
    return (own_system or system) + own  # a system message may stand in the prompt alone


def _system_and_others(turns: list[Turn]) -> tuple[list[Turn], list[Turn]]:
    """The system message, if there is one, and the other turns."""
    begins = int(bool(turns) and turns[0][0] == SYSTEM)
    return turns[:begins], turns[begins:]


def _common_beginning(chosen: str, rejected: str) -> tuple[list[Turn], list[Any]]:
    """Prompt and answers of two strings: what they have in common, up to where a word of theirs begins."""
    if chosen == rejected:
        raise Unfit("equal_answers")
    shared = zip(chosen, rejected, strict=False)
    end = next((n for n, pair in enumerate(shared) if pair[0] != pair[1]), min(len(chosen), len(rejected)))
    while end and not chosen[end - 1].isspace() and not _UNSPACED.match(chosen[end - 1]):
        end -= 1
    if not chosen[:end].strip():
        raise Unfit("prompts_differ")
    return [(USER, chosen[:end].strip())], [chosen[end:], rejected[end:]]

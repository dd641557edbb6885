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
    system_of,
    turns_in,
    without_empty_system,
)  # fmt: skip

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

    `{"prompt", "chosen", "rejected"}`, each a string or turns, the answers with the prompt in front or without it;
    `{"chosen", "rejected"}` alone, whose common beginning is the prompt (TRL's two forms); or LLaMA-Factory's, the two
    answers beside ShareGPT's `conversations` or Alpaca's `instruction`. A prompt beside answers that hold theirs is the
    whole of it, or how it begins or ends.

    Raises:
        Unfit: it holds none, its turns are empty or out of order, its two answers are equal, or they answer different
            prompts.
    """
    if not isinstance(record, dict) or not {"chosen", "rejected"} <= record.keys():
        raise Unfit("not_a_pair")
    prompt = _pair_prompt(record)
    answers = [record["chosen"], record["rejected"]]
    if all(isinstance(answer, str) for answer in answers) and not prompt:
        prompt, answers = _common_beginning(*answers)
    chosen, rejected = (answer_turns(answer) for answer in answers)
    if not chosen or not rejected:
        raise Unfit("empty_assistant_turn")
    if len(chosen) > 1 or len(rejected) > 1:  # the answers hold the prompt
        if chosen[:-1] != rejected[:-1]:
            raise Unfit("prompts_differ")
        goes_on = chosen[0][0] == ASSISTANT  # for several turns
        prompt = prompt + chosen[:-1] if goes_on else _agreed(prompt, chosen[:-1])
    if not prompt:
        raise Unfit("empty_user_turn")
    for answer in (chosen, rejected):
        if in_order([*prompt, answer[-1]])[-1][0] != ASSISTANT:
            raise Unfit("no_answer")
    if chosen[-1] == rejected[-1]:
        raise Unfit("equal_answers")
    return Pair(prompt, chosen[-1][1], rejected[-1][1])


def _pair_prompt(record: dict[str, Any]) -> list[Turn]:
    if record.get("prompt") is not None:
        return without_empty_system(system_of(record) + prompt_turns(record["prompt"]))
    if "instruction" in record:
        return alpaca_prompt(record)
    return without_empty_system(turns_in(record) or [])


def _agreed(prompt: list[Turn], shared: list[Turn]) -> list[Turn]:
    """The turns in front of both answers, once the record's own prompt is seen to be part of them."""
    system, said = _apart(prompt)
    own_system, own = _apart(shared)
    if system and own_system and system != own_system:
        raise Unfit("prompts_differ")
    if said not in (own[: len(said)], own[-len(said) :]):
        raise Unfit("prompts_differ")
    return (own_system or system) + own  # a system message may stand in the prompt alone


def _apart(turns: list[Turn]) -> tuple[list[Turn], list[Turn]]:
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

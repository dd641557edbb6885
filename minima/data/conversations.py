"""Records of many layouts -> conversations and preference pairs of one."""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from minima.data.documents import Rejected
from minima.data.sources import read_records, some
from minima.recipe.data import Source

Turn = tuple[str, str]  # role and text

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
# OpenAI's names, ShareGPT's, and what its users put in their place.
_ROLES = {
    "system": SYSTEM, "developer": SYSTEM, "user": USER, "human": USER, "prompter": USER,
    "assistant": ASSISTANT, "gpt": ASSISTANT, "chatgpt": ASSISTANT, "model": ASSISTANT, "bot": ASSISTANT,
}  # fmt: skip
_UNSPACED = re.compile("[\u3000-\u9fff\uff00-\uffef]")  # characters of scripts that part no words
_TURN_FIELDS = ("messages", "conversations", "conversation", "turns", "dialog", "dialogue")


class Unfit(Exception):
    """A record that is no conversation or pair: never shown, but counted by its reason."""


class Conversation(NamedTuple):
    """Turns in order: perhaps a system message, then user and assistant by turns; the last is the assistant's.

    Attributes:
        turns: role and text, stripped.
        left_out: turns at the end of the record that nobody answers.
    """

    turns: list[Turn]
    left_out: int = 0

    @property
    def content(self) -> str:
        """What is hashed to choose held-out conversations: the turns alone, whatever layout they came in."""
        return _compact(self.turns)

    @property
    def documents(self) -> list[list[Turn]]:
        """The conversation alone."""
        return [self.turns]


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
        return _compact(self.prompt)

    @property
    def documents(self) -> list[list[Turn]]:
        """The prompt with the chosen and with the rejected answer."""
        return [[*self.prompt, (ASSISTANT, answer)] for answer in (self.chosen, self.rejected)]


def read_conversations(source: Source, rejected: Rejected, *, pairs: bool = False) -> Iterator[str]:
    """The conversations or preference pairs of a source, packed into strings; `unpack` gives them back.

    Args:
        source: says where and in which format; the layout is told from each record.
        rejected: takes what is none.
        pairs: read preference pairs.

    Raises:
        DataError: the source is missing, cannot be opened, or gives not one.
    """

    def packed() -> Iterator[str]:
        for where, record in read_records(source, rejected):
            try:
                item = pair_of(record) if pairs else conversation_of(record)
            except Unfit as unfit:
                rejected.add(str(unfit), where, record)
            else:
                yield f"{_compact(item)}\n{where}"

    what = "preference pairs" if pairs else "conversations"
    yield from some(packed(), source, rejected, f"that its records are {what} in a layout that is known")


def unpack(packed: str, *, pairs: bool = False) -> tuple[Conversation | Pair, str]:
    """A conversation or pair, and where it was read."""
    content, where = packed.split("\n", 1)  # JSON on one line holds no line break
    fields = json.loads(content)
    return (Pair if pairs else Conversation)(*fields), where


def conversation_of(record: Any) -> Conversation:
    """The conversation that a record holds.

    A list of turns, or a record with such a list as `messages`, `conversations`, `conversation`, `turns`, `dialog` or
    `dialogue`. A turn is `{"User", "Assistant"}` (both of an exchange), `{"role", "content"}` (OpenAI) or `{"from",
    "value"}` (ShareGPT). Or `{"instruction", "input", "output"}` (Alpaca), with `system` and `history` (a list of
    question and answer) as LLaMA-Factory has them; or `{"prompt", "completion"}` (TRL), strings or turns.

    Raises:
        Unfit: it holds none, or one whose turns are empty or out of order.
    """
    turns = _turns_of(record)
    if turns is None and isinstance(record, dict):
        if "completion" in record:
            turns = _prompt_turns(record.get("prompt")) + _answer_turns(record["completion"])
        elif "output" in record and "instruction" in record:
            turns = [*_alpaca_prompt(record), (ASSISTANT, _text(record["output"]))]
    if turns is None:
        raise Unfit("not_a_conversation")
    turns = _in_order(turns)
    answered = max((number for number, (role, _) in enumerate(turns, 1) if role == ASSISTANT), default=0)
    if not answered:
        raise Unfit("no_answer")
    return Conversation(turns[:answered], len(turns) - answered)


def pair_of(record: Any) -> Pair:
    """The preference pair that a record holds.

    `{"prompt", "chosen", "rejected"}`, each a string or turns, the answers with the prompt in front or without it;
    `{"chosen", "rejected"}` alone, whose common beginning is the prompt (TRL's two forms); or LLaMA-Factory's, the two
    answers beside ShareGPT's `conversations` or Alpaca's `instruction`.

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
    chosen, rejected = (_answer_turns(answer) for answer in answers)
    if not chosen or not rejected:
        raise Unfit("empty_assistant_turn")
    if len(chosen) > 1 or len(rejected) > 1:  # the answers hold the prompt
        if chosen[:-1] != rejected[:-1]:
            raise Unfit("prompts_differ")
        if chosen[0][0] == ASSISTANT:  # they go on for several turns
            prompt = prompt + chosen[:-1]
        else:
            system = [turn for turn in prompt[:1] if turn[0] == SYSTEM != chosen[0][0]]  # it may stand there alone
            prompt = system + chosen[:-1]
    if not prompt:
        raise Unfit("empty_user_turn")
    for answer in (chosen, rejected):
        if _in_order([*prompt, answer[-1]])[-1][0] != ASSISTANT:
            raise Unfit("no_answer")
    if chosen[-1] == rejected[-1]:
        raise Unfit("equal_answers")
    return Pair(prompt, chosen[-1][1], rejected[-1][1])


# -- layouts -----------------------------------------------------------------------------------------------------


def _turns_of(record: Any) -> list[Turn] | None:
    """The turns of a list of them, or of a record that holds such a list; None where there is none."""
    if isinstance(record, dict):
        for field in _TURN_FIELDS:
            if isinstance(record.get(field), list):
                turns = _listed(record[field])
                return turns if turns and turns[0][0] == SYSTEM else _system(record) + turns
        return None
    return _listed(record) if isinstance(record, list) else None


def _listed(turns: list[Any]) -> list[Turn]:
    found: list[Turn] = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise Unfit("not_a_conversation")
        if "User" in turn and "Assistant" in turn:
            found += [(USER, _text(turn["User"])), (ASSISTANT, _text(turn["Assistant"]))]
        elif "role" in turn:
            found.append((_role(turn["role"]), _text(turn.get("content"))))
        elif "from" in turn:
            found.append((_role(turn["from"]), _text(turn.get("value"))))
        else:
            raise Unfit("not_a_conversation")
    return found


def _alpaca_prompt(record: dict[str, Any]) -> list[Turn]:
    turns = _system(record)
    for exchange in record.get("history") or []:
        if not isinstance(exchange, list | tuple) or len(exchange) != 2:
            raise Unfit("not_a_conversation")
        turns += [(USER, _text(exchange[0])), (ASSISTANT, _text(exchange[1]))]
    parts = [_text(record.get(field)) for field in ("instruction", "input")]
    return [*turns, (USER, "\n".join(part for part in parts if part))]


def _system(record: dict[str, Any]) -> list[Turn]:
    system = _text(record.get("system"))
    return [(SYSTEM, system)] if system else []


def _pair_prompt(record: dict[str, Any]) -> list[Turn]:
    if record.get("prompt") is not None:
        return _strip(_system(record) + _prompt_turns(record["prompt"]))
    if "instruction" in record:
        return _alpaca_prompt(record)
    return _strip(_turns_of(record) or [])


def _prompt_turns(prompt: Any) -> list[Turn]:
    if isinstance(prompt, list):
        return _listed(prompt)
    text = _text(prompt)
    return [(USER, text)] if text else []


def _answer_turns(answer: Any) -> list[Turn]:
    """An answer's turns; the prompt's may be in front."""
    if isinstance(answer, dict):
        answer = [answer]
    if isinstance(answer, list):
        return _strip(_listed(answer))
    return [(ASSISTANT, _text(answer))]


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


# -- turns -------------------------------------------------------------------------------------------------------


def _role(name: Any) -> str:
    if isinstance(name, str) and name.lower() in _ROLES:
        return _ROLES[name.lower()]
    raise Unfit("unknown_role")


def _text(content: Any) -> str:
    """A turn's text, stripped; of a list of parts (OpenAI's), all of them."""
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
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise Unfit("not_utf8") from None
    return content.strip()


def _strip(turns: list[Turn]) -> list[Turn]:
    """Without an empty system message, which says nothing."""
    return [turn for turn in turns if turn != (SYSTEM, "")]


def _in_order(turns: list[Turn]) -> list[Turn]:
    """Turns that alternate and hold something.

    Raises:
        Unfit: they do not.
    """
    turns = _strip(turns)
    begins = int(bool(turns) and turns[0][0] == SYSTEM)
    for number, (role, text) in enumerate(turns[begins:]):
        if role != (USER, ASSISTANT)[number % 2]:
            raise Unfit("roles_out_of_order")
        if not text:
            raise Unfit(f"empty_{role}_turn")
    return turns


def _compact(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))

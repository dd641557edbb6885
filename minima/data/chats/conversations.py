"""Reading a source's conversations and preference pairs, and converting records of many layouts to one."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from minima.data.chats.preferences import Pair, pair_of
from minima.data.chats.turns import (
    ASSISTANT,
    Turn,
    Unfit,
    alpaca_prompt,
    answer_turns,
    compact,
    in_order,
    prompt_turns,
    text_of,
    turns_in,
    under_system,
    unlearnt_in,
)
from minima.data.documents import Rejected
from minima.data.parts.share import Share
from minima.data.sources import read_records, some
from minima.recipe.data import Source


class Conversation(NamedTuple):
    """Turns in order: an optional system message, then user and assistant alternating; the last is the assistant's."""

    turns: list[Turn]  # role and text, stripped
    left_out: int = 0  # number of unanswered turns at the end of the record
    unlearnt: Sequence[int] = ()  # numbers of the replies, from 0, that are context only and not trained on

    @property
    def content(self) -> str:
        """The string that is hashed to choose held-out conversations: the turns, independent of the record's layout."""
        return compact(self.turns)

    @property
    def documents(self) -> list[list[Turn]]:
        """The conversation as the only document."""
        return [self.turns]


def read_conversations(
    source: Source, rejected: Rejected, *, pairs: bool = False, share: Share | None = None
) -> Iterator[str]:
    """Read a source's conversations or preference pairs, packed into strings that `unpack` reverses.

    Args:
        source: gives location and format; the layout is recognised record by record.
        rejected: collects the records that are not conversations or pairs.
        share: read only the records of this share; all if not given.

    Raises:
        DataError: the source is missing, cannot be opened, or has no valid record.
    """
    share = share or Share()

    def packed() -> Iterator[str]:
        for where, record in read_records(source, rejected, share):
            try:
                item = pair_of(record) if pairs else conversation_of(record)
            except Unfit as unfit:
                rejected.add(str(unfit), where, record)
            else:
                every = isinstance(item, Conversation) and not item.unlearnt
                yield f"{compact(item[:2] if every else item)}\n{where}"

    what = "preference pairs" if pairs else "conversations"
    yield from some(packed(), source, rejected, f"that its records are {what} in a supported layout", share)


def unpack(packed: str, *, pairs: bool = False) -> tuple[Conversation | Pair, str]:
    """A conversation or pair, and where it was read."""
    content, where = packed.split("\n", 1)  # the JSON is on one line
    fields = json.loads(content)
    return (Pair if pairs else Conversation)(*fields), where


def conversation_of(record: Any) -> Conversation:
    """The conversation in a record.

    Supported layouts: a list of turns, or a record with such a list as `messages`, `conversations`, `conversation`,
    `turns`, `dialog` or `dialogue`, where a turn is `{"User", "Assistant"}` (both of an exchange), `{"role",
    "content"}` (OpenAI) or `{"from", "value"}` (ShareGPT); `{"instruction", "input", "output"}` (Alpaca), optionally
    with `history` (a list of question and answer) as in LLaMA-Factory; `{"prompt", "completion"}` (TRL), strings or
    turns. A `system` or `system_prompt` field beside them comes first. A reply with `weight: 0` (OpenAI) is context
    only and not trained on.

    Raises:
        Unfit: there is no conversation, its turns are empty or out of order, or nothing in it can be trained on.
    """
    turns, unlearnt = turns_in(record), unlearnt_in(record)
    if turns is None and isinstance(record, dict):
        if "completion" in record:
            turns = under_system(record, prompt_turns(record.get("prompt"))) + answer_turns(record["completion"])
        elif "output" in record and "instruction" in record:
            turns = [*alpaca_prompt(record), (ASSISTANT, text_of(record["output"]))]
    if turns is None:
        raise Unfit("not_a_conversation")
    turns = in_order(turns)
    answered = max((number for number, (role, _) in enumerate(turns, 1) if role == ASSISTANT), default=0)
    if not answered:
        raise Unfit("no_answer")
    if unlearnt and len(unlearnt) == sum(role == ASSISTANT for role, _ in turns):
        raise Unfit("nothing_to_learn")
    return Conversation(turns[:answered], len(turns) - answered, tuple(unlearnt))

"""Encoding of conversations and preference pairs into token ids and a mask of trainable tokens, in a worker process."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from minima.data.chats.conversations import Conversation, unpack
from minima.data.chats.preferences import Pair
from minima.data.chats.templates import ChatTemplate, ChatTokenizer, TokenizedChat
from minima.data.chats.turns import ASSISTANT, SYSTEM, Unfit
from minima.data.encoding import Encoded, EncodingTask, Result
from minima.data.store import token_dtype

_AT_ONCE = 64  # conversations given to the tokenizer in one call


class _Unit(NamedTuple):
    """One conversation, or the two of a pair."""

    ids: list[int]
    learnt: np.ndarray
    size: int
    characters: int
    first: int
    cut: int = 0
    unanswered: int = 0


class ChatEncoder:
    """Encodes packed conversations or pairs; those that are too long are cut at a turn boundary or rejected.

    Args:
        folder: holds `tokenizer.json`.
        vocabulary_size: decides between two and four bytes per id.
        sequence_length: the maximum length of a conversation or pair in tokens.
        pairs: the texts are preference pairs.
    """

    def __init__(
        self, folder: Path, template: ChatTemplate, vocabulary_size: int, sequence_length: int, pairs: bool
    ) -> None:
        from tokenizers import Tokenizer

        self._chat = ChatTokenizer(Tokenizer.from_file(str(folder / "tokenizer.json")), template)
        self._dtype, self._limit, self._pairs = np.dtype(token_dtype(vocabulary_size)), sequence_length, pairs

    def __call__(self, batch: EncodingTask) -> Result:
        """Encode conversations or pairs."""
        records = [unpack(text, pairs=self._pairs) for text in batch.texts]
        held_out = batch.held_out.mask([record.content.encode("utf-8") for record, _ in records])
        units: list[_Unit] = []
        aside: list[bool] = []
        rejected: list[tuple[str, str, str]] = []
        kept = np.flatnonzero(~held_out) if batch.skip_held_out else np.arange(len(records))
        for begin in range(0, len(kept), _AT_ONCE):
            some = kept[begin : begin + _AT_ONCE].tolist()
            for number, unit in zip(some, self._encode([records[number][0] for number in some]), strict=True):
                if isinstance(unit, Unfit):
                    rejected.append((str(unit), records[number][1], batch.texts[number].partition("\n")[0]))
                else:
                    units.append(unit)
                    aside.append(bool(held_out[number]))
        return Result(self._columns(units), np.array(aside, dtype=bool), rejected)

    def _encode(self, records: list[Conversation | Pair]) -> list[_Unit | Unfit]:
        chats = iter(self._chat.encode([turns for record in records for turns in record.documents]))
        units: list[_Unit | Unfit] = []
        for record in records:
            found = [next(chats) for _ in record.documents]
            try:
                if any(self._chat.forged(turns) for turns in record.documents):
                    raise Unfit("forged_marker")
                fit = [_fitting(chat) for chat in found]
                if isinstance(record, Conversation):
                    units.append(self._conversation(record, fit[0]))
                else:
                    units.append(self._pair(record, *fit))
            except Unfit as unfit:
                units.append(unfit)
        return units

    def _conversation(self, record: Conversation, chat: TokenizedChat) -> _Unit:
        """Encode a conversation, or as many of its exchanges as fit."""
        turns, exchanges = record.turns, len(chat.replies)
        while len(chat.ids) > self._limit:
            fitting = sum(end <= self._limit for _, end in chat.replies[:-1])
            exchanges = min(fitting, exchanges - 1)
            if not exchanges:
                raise Unfit("too_long")
            turns = turns[: 2 * exchanges + (turns[0][0] == SYSTEM)]
            chat = _fitting(*self._chat.encode([turns]))
        replies = [text for role, text in turns if role == ASSISTANT]
        kept = [number for number in range(len(replies)) if number not in record.unlearnt]
        if not kept:
            raise Unfit("nothing_to_learn")  # all trainable replies have been cut off
        size = sum(len(replies[number].encode("utf-8")) for number in kept)
        cut, learnt = len(record.turns) - len(turns), _learnt(chat, [chat.replies[number] for number in kept])
        return _Unit(chat.ids, learnt, size, len(chat.text), len(chat.ids), cut, record.left_out)

    def _pair(self, record: Pair, chosen: TokenizedChat, rejected: TokenizedChat) -> _Unit:
        """Encode both answers, each after the prompt; together they must fit into one block."""
        if len(chosen.ids) + len(rejected.ids) > self._limit:
            raise Unfit("too_long")
        learnt = [_learnt(chat, chat.replies[-1:]) for chat in (chosen, rejected)]
        if chosen.ids == rejected.ids:
            raise Unfit("equal_answers")
        size = sum(len(text.encode("utf-8")) for text in (record.chosen, record.rejected))
        characters = len(chosen.text) + len(rejected.text)
        return _Unit(chosen.ids + rejected.ids, np.concatenate(learnt), size, characters, len(chosen.ids))

    def _columns(self, units: list[_Unit]) -> Encoded:
        ids = [np.empty(0, dtype=self._dtype), *(np.array(unit.ids, dtype=self._dtype) for unit in units)]
        learnt = [np.empty(0, dtype=np.uint8), *(unit.learnt for unit in units)]
        numbers = [(len(u.ids), u.size, u.characters, u.first, u.cut, u.unanswered) for u in units]
        lengths, sizes, characters, *others = np.array(numbers, dtype=np.int64).reshape(-1, 6).T
        return Encoded(np.concatenate(ids), lengths, sizes, characters, np.concatenate(learnt), *others)


def _fitting(chat: TokenizedChat | Unfit) -> TokenizedChat:
    if isinstance(chat, Unfit):
        raise chat
    return chat


def _learnt(chat: TokenizedChat, replies: list[tuple[int, int]]) -> np.ndarray:
    """A mask with 1 for the tokens of these replies."""
    learnt = np.zeros(len(chat.ids), dtype=np.uint8)
    for begin, end in replies:
        learnt[begin:end] = 1
    if not learnt.any():
        raise Unfit("no_answer")
    return learnt

"""Recording documents as they are read, encoding them, and collecting them into the pieces of a part."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from minima.data import documents
from minima.data.documents import HeldOut, Rejected, shortened
from minima.data.encoding import Encoded, EncodingPool, EncodingTask, Result
from minima.data.parts.files import COLUMNS, ORDER, TAKEN, Piece
from minima.data.parts.share import Share
from minima.recipe.data import Source

# The tokens of one piece, which are collected in memory before they are written: 64 MB at two bytes per token.
PIECE_TOKENS = 1 << 25
PIECE_RECORDS = 1 << 17  # limit for tiny documents and rejected records, whose metadata outweighs their ids

Reader = Callable[..., Iterator[str]]  # called with a source, a `Rejected` and a share


class Run(NamedTuple):
    """Consecutive documents of one block, and the records rejected between them, each with the documents before it."""

    place: tuple[int, int]
    texts: list[str]
    rejected: list[tuple[int, str, str, str]]


class _Noted(Rejected):
    """Keeps each rejected record with the place where it was read, until it is collected."""

    def __init__(self, share: Share) -> None:
        super().__init__()
        self.share = share
        self.noted: list[tuple[tuple[int, int], tuple[str, str, str]]] = []

    def add(self, reason: str, where: str, content: object) -> None:
        self.noted.append((self.share.place, (reason, where, shortened(content))))


def runs(source: Source, share: Share, read: Reader) -> Iterator[Run]:
    """A share's documents in non-empty runs of about one batch."""
    run, held = Run((0, 0), [], []), 0
    for place, text, record in _events(source, share, read):
        large = held >= documents.BATCH_CHARACTERS or len(run.texts) >= documents.BATCH_DOCUMENTS
        if large or run.place != place:
            if run.texts or run.rejected:
                yield run
            run, held = Run(place, [], []), 0
        if text is not None:
            run.texts.append(text)
            held += len(text)
        if record is not None:
            run.rejected.append((len(run.texts), *record))
    if run.texts or run.rejected:
        yield run


def _events(
    source: Source, share: Share, read: Reader
) -> Iterator[tuple[tuple[int, int], str | None, tuple[str, str, str] | None]]:
    """Documents and rejected records in reading order, each with its place."""
    rejected = _Noted(share)
    for text in read(source, rejected, share=share):
        own = share.place
        for place, record in rejected.noted:
            yield place, None, record
        rejected.noted.clear()
        yield own, text, None
    for place, record in rejected.noted:
        yield place, None, record


def encoded(runs: Iterator[Run], pool: EncodingPool, rule: HeldOut) -> Iterator[tuple[Run, Result]]:
    """Each run with its encoding result; the pool works ahead."""
    pending: deque[tuple[Run, Any]] = deque()
    for run in runs:
        pending.append((run, pool.submit(EncodingTask(run.texts, rule))))
        if len(pending) > 2 * pool.processes + 1:
            first, task = pending.popleft()
            yield first, pool.result(task)
    for first, task in pending:
        yield first, pool.result(task)


class Waiting:
    """Encoded runs that are collected into one piece."""

    def __init__(self) -> None:
        self.runs: list[tuple[int, int, int]] = []
        self._encoded: list[Encoded] = []
        self._tables: list[np.ndarray] = []
        self._rejected: list[tuple[int, int, str, str, str]] = []
        self._refused: dict[int, tuple[str, str, str]] = {}
        self._documents = self._tokens = 0

    @property
    def full(self) -> bool:
        return self._tokens >= PIECE_TOKENS or self._documents + len(self._rejected) >= PIECE_RECORDS

    def add(self, run: Run, result: Result) -> None:
        self._rejected += [(len(self.runs), *record) for record in run.rejected]
        refused = deque(result.rejected)
        taken = np.ones(len(run.texts), dtype=bool)
        if refused:
            for number, text in enumerate(run.texts):
                if refused and text.partition("\n")[2] == refused[0][1]:  # the text is packed with its place: `unpack`
                    reason, where, content = refused.popleft()
                    self._refused[self._documents + number] = reason, where, shortened(content)
                    taken[number] = False
        assert not refused
        documents = result.documents
        table = np.zeros((len(run.texts), COLUMNS), dtype=np.int64)
        columns = [documents.lengths, documents.sizes, documents.characters, documents.firsts, documents.cut,
                   documents.unanswered]  # fmt: skip
        begins = self._tokens + np.concatenate([[0], np.cumsum(documents.lengths)[:-1]])[: len(documents.lengths)]
        for number, column in enumerate([begins, *columns, result.held_out]):
            if column is not None:
                table[taken, number] = column
        table[:, ORDER] = [len(text) for text in run.texts]
        table[:, TAKEN] = taken
        self.runs.append((*run.place, len(run.texts)))
        self._tables.append(table)
        self._encoded.append(documents)
        self._documents += len(table)
        self._tokens += len(documents.ids)

    def piece(self) -> Piece:
        everything = Encoded.joined(self._encoded)
        runs = np.array(self.runs, dtype=np.int64).reshape(-1, 3)
        table = np.concatenate(self._tables)
        return Piece(everything.ids, everything.learnt, table, runs, self._rejected, self._refused)

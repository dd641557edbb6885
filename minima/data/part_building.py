"""One part of a divided build: its share of every source's records, read and encoded, for the merge to put in order."""

import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minima.data import documents
from minima.data.builder import Plan, make_tokenizer, processes_of
from minima.data.documents import HeldOut, Rejected, shortened
from minima.data.encoding import Batch, Encoded, EncodingPool, Result
from minima.data.part_files import (
    COLUMNS,
    INDEX,
    Part,
    Piece,
    check_file,
    files_of,
    folder_sha256,
    read_index,
    write_index,
    write_piece,
)
from minima.data.share import Share
from minima.disk import disk_full_named
from minima.errors import StoreCorrupted
from minima.recipe.data import Source, TokenizerTraining
from minima.recipe.schema import BuildData

_LOG = logging.getLogger("minima.data")
_LOG_EVERY_SECONDS = 5.0
# What waits in memory, and is one file: 64 MB at two bytes a token.
PIECE_TOKENS = 1 << 25
PIECE_RECORDS = 1 << 18  # documents of a few tokens, and rejected records, take more room beside than by their ids


def is_recorded(folder: Path, identity: str) -> bool:
    """Whether a part is finished and whole; one that is damaged, or was made from something else, is made again.

    Args:
        folder: the part's.
        identity: of the stage.
    """
    if not (folder / INDEX).is_file():
        return False
    try:
        index = read_index(folder)
        for file in files_of(index):
            check_file(folder, file, verify=True)
    except StoreCorrupted as error:
        _LOG.warning("%s: it is made again", error.what)
        return False
    same: bool = index["identity"] == identity
    return same


def build_part(
    stage: BuildData, folder: Path, tokenizer: str | Path | TokenizerTraining, part: Part, identity: str
) -> dict[str, Any]:
    """Encode a part's share of every source.

    It is written under a temporary name, synced and renamed at the end; a part that was interrupted begins again.
    Memory: some `PIECE_TOKENS` and the batches under way.

    Args:
        stage: what is built.
        folder: of all parts; exists.
        tokenizer: the folder or Hub id of a tokenizer, or how to train one, which each part does for itself: the same
            texts give the same tokenizer, and the merge compares them.
        part: which.
        identity: of the stage.

    Returns:
        `documents`, `tokens` and `seconds`.

    Raises:
        DataError: a source is missing or unreadable.
        DiskFull: no space left.
    """
    started = time.monotonic()
    final, unfinished = folder / part.name, folder / f"{part.name}.partial"
    with disk_full_named(folder):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            plan = make_tokenizer(stage, tokenizer, unfinished / "tokenizer")
            sources = _encode(stage, unfinished, plan, part)
            index = {
                "identity": identity,
                "part": list(part),
                "tokenizer": folder_sha256(unfinished / "tokenizer"),
                "sources": sources,
                "seconds": round(time.monotonic() - started, 3),
            }
            shutil.rmtree(unfinished / "tokenizer")
            write_index(unfinished, index)
            _sync(unfinished)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(unfinished, final)
            _sync(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    counts = {name: sum(piece[name] for pieces in sources for piece in pieces) for name in ("documents", "tokens")}
    return counts | {"seconds": index["seconds"]}


def _encode(stage: BuildData, folder: Path, plan: Plan, part: Part) -> list[list[dict[str, Any]]]:
    """Write all pieces; what the index says of them, source by source."""
    rule = HeldOut(stage.held_out_fraction, stage.seed)
    written: list[list[dict[str, Any]]] = []
    last, tokens = time.monotonic(), 0
    with EncodingPool(plan.make, processes_of(stage)) as pool:
        for number, source in enumerate(stage.sources):
            pieces: list[dict[str, Any]] = []
            waiting = _Waiting()
            for run, result in _encoded(_runs(source, Share(*part, number), plan), pool, rule):
                waiting.add(run, result)
                tokens += len(result.documents.ids)
                if waiting.full:
                    pieces.append(write_piece(folder, f"source-{number:02d}-{len(pieces):05d}", waiting.piece()))
                    waiting = _Waiting()
                if time.monotonic() - last > _LOG_EVERY_SECONDS:
                    last = time.monotonic()
                    _LOG.info("part %s: %.1f M tokens, source %s", part, tokens / 1e6, source.label)
            if waiting.runs:
                pieces.append(write_piece(folder, f"source-{number:02d}-{len(pieces):05d}", waiting.piece()))
            written.append(pieces)
    return written


class _Run(NamedTuple):
    """Neighbouring documents of one block, and what was rejected between them: how many came before, and what."""

    place: tuple[int, int]
    texts: list[str]
    rejected: list[tuple[int, str, str, str]]


class _Noted(Rejected):
    """Keeps each record with the place where it was read, until it is taken."""

    def __init__(self, share: Share) -> None:
        super().__init__()
        self.share = share
        self.noted: list[tuple[tuple[int, int], tuple[str, str, str]]] = []

    def add(self, reason: str, where: str, content: object) -> None:
        self.noted.append((self.share.place, (reason, where, shortened(content))))


def _runs(source: Source, share: Share, plan: Plan) -> Iterator[_Run]:
    """A share's documents, in runs of about a batch; none is empty."""
    run, held = _Run((0, 0), [], []), 0
    for place, text, record in _events(source, share, plan):
        large = held >= documents.BATCH_CHARACTERS or len(run.texts) >= documents.BATCH_DOCUMENTS
        if large or run.place != place:
            if run.texts or run.rejected:
                yield run
            run, held = _Run(place, [], []), 0
        if text is not None:
            run.texts.append(text)
            held += len(text)
        if record is not None:
            run.rejected.append((len(run.texts), *record))
    if run.texts or run.rejected:
        yield run


def _events(
    source: Source, share: Share, plan: Plan
) -> Iterator[tuple[tuple[int, int], str | None, tuple[str, str, str] | None]]:
    """In reading order: a place, and the document or the rejected record that was there."""
    rejected = _Noted(share)
    for text in plan.read(source, rejected, share=share):
        own = share.place
        for place, record in rejected.noted:
            yield place, None, record
        rejected.noted.clear()
        yield own, text, None
    for place, record in rejected.noted:
        yield place, None, record


def _encoded(runs: Iterator[_Run], pool: EncodingPool, rule: HeldOut) -> Iterator[tuple[_Run, Result]]:
    """Each run with what it became, encoded ahead by the pool."""
    pending: deque[tuple[_Run, Any]] = deque()
    for run in runs:
        pending.append((run, pool.submit(Batch(run.texts, rule))))
        if len(pending) > 2 * pool.processes + 1:
            first, task = pending.popleft()
            yield first, pool.result(task)
    for first, task in pending:
        yield first, pool.result(task)


class _Waiting:
    """Encoded runs that will be one piece."""

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

    def add(self, run: _Run, result: Result) -> None:
        self._rejected += [(len(self.runs), *record) for record in run.rejected]
        refused = deque(result.rejected)
        taken = np.ones(len(run.texts), dtype=bool)
        if refused:
            for number, text in enumerate(run.texts):
                if refused and text.partition("\n")[2] == refused[0][1]:  # packed with its place, see `unpack`
                    reason, where, content = refused.popleft()
                    self._refused[self._documents + number] = reason, where, shortened(content)
                    taken[number] = False
        assert not refused
        documents = result.documents
        table = np.zeros((len(run.texts), COLUMNS), dtype=np.int64)
        columns = [documents.lengths, documents.sizes, documents.characters, documents.firsts, documents.cut]
        begins = self._tokens + np.concatenate([[0], np.cumsum(documents.lengths)[:-1]])[: len(documents.lengths)]
        for number, column in enumerate([begins, *columns, result.held_out]):
            if column is not None:
                table[taken, number] = column
        table[:, COLUMNS - 2] = [len(text) for text in run.texts]
        table[:, COLUMNS - 1] = taken
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


def _sync(folder: Path) -> None:
    """Make the names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

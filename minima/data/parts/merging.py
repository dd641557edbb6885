"""The merge of a divided build: reads the parts' recorded documents as if they were being encoded now."""

import heapq
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from minima.data.documents import HeldOut, Rejected
from minima.data.encoding import Encoded, EncodingPool, EncodingTask, Result
from minima.data.parts.files import (
    BEGIN,
    CHARACTERS,
    CUT,
    FIRST,
    HELD_OUT,
    INDEX,
    LENGTH,
    ORDER,
    SIZE,
    TAKEN,
    UNANSWERED,
    Part,
    Piece,
    check_file,
    files_of,
    part_of,
    read_index,
    read_piece,
)
from minima.data.parts.recording import Reader, Waiting, encoded, runs
from minima.data.parts.share import Share
from minima.data.sources import read_source, some
from minima.disk import raise_file_limit
from minima.errors import DataError, StageError
from minima.recipe.data import Source

logger = logging.getLogger("minima.data")
Encode = Callable[[EncodingTask], Result]


class RecordedDocument:
    """A placeholder for a document's text, with the same length, so that it gets the same place in a seeded order."""

    __slots__ = ("_length", "piece", "row")

    def __init__(self, piece: Piece, row: int, length: int) -> None:
        self.piece, self.row, self._length = piece, row, length

    def __len__(self) -> int:
        return self._length


class _Run(NamedTuple):
    """Consecutive documents of one block: rows of a piece, and the records rejected between them."""

    place: tuple[int, int]
    piece: Piece
    rows: range
    rejected: list[tuple[int, int, str, str, str]]


def check_counts(folder: Path, count: int | None = None) -> int:
    """The number of parts that this folder's build is divided into.

    Args:
        count: the number requested now; derived from the existing parts if not given.

    Raises:
        StageError: there are parts from different divisions, or from another one than requested.
        DataError: there is no part, and no number is requested.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    counts = {part.total: str(folder / name) for name in names if (part := part_of(name)) is not None}
    if count is not None:
        counts.setdefault(count, f"the requested one, of {count}")
    if len(counts) > 1:
        raise StageError(
            f"{folder} holds parts of several divisions: {', '.join(counts.values())}",
            "each division distributes the records differently, so together they would miss some and repeat others",
            f"remove those that you do not want (or all of {folder}), or request the same number of parts",
        )
    if not counts:
        raise DataError(
            f"{folder} holds no parts",
            "there is nothing to merge",
            "run the parts, or remove the folder to build in one process",
        )
    return next(iter(counts))


class RecordedParts:
    """All parts of a build; for the mixture it acts as both the pool that encodes and the reader of each source.

    Attributes:
        processes: determines how many batches are submitted ahead.
        seconds: total time that the parts took.
    """

    def __init__(self, folder: Path, identity: str, command: str, processes: int) -> None:
        """Check that all parts exist, belong to this stage, and have their files.

        Args:
            folder: of all parts.
            command: the command that runs a part, without its number; for messages.

        Raises:
            DataError: parts are missing; the message names them and the command.
            StageError: a part was made from something else.
            StoreCorrupted: a file is missing or truncated.
        """
        self.processes = processes
        count = check_counts(folder)
        parts = [Part(number, count) for number in range(count)]
        missing = [part for part in parts if not (folder / part.name / INDEX).is_file()]
        if missing:
            shown = ", ".join(map(str, missing[:10])) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
            raise DataError(
                f"{len(missing)} of {count} parts are missing in {folder}: {shown}",
                "their documents would not be in the blocks",
                f"run them ({command} {missing[0]}), or remove {folder} to build in one process",
            )
        self._folders = [folder / part.name for part in parts]
        self._indices = [read_index(one) for one in self._folders]
        for part, one, index in zip(parts, self._folders, self._indices, strict=True):
            if index["identity"] != identity or index["part"] != list(part):
                raise StageError(
                    f"{one} was made from another recipe, from other sources, or from other records than its name says",
                    "documents of two different builds would be mixed",
                    f"run it again ({command} {part})",
                )
            for file in files_of(index):
                check_file(one, file, verify=False)
        self.seconds = sum(index["seconds"] for index in self._indices)
        self._command, self._verified = command, set[tuple[Path, str]]()
        self._read: Reader = read_source
        self._make: Callable[[], Encode] | None = None
        self._held_out = HeldOut(0.0, 0)
        self._pool: EncodingPool | None = None

    def __enter__(self) -> Self:
        raise_file_limit()
        return self

    def __exit__(self, *failure: Any) -> None:
        if self._pool is not None:
            self._pool.__exit__(*failure)

    def prepare(self, sha256: str, read: Reader, make: Callable[[], Encode], held_out: HeldOut) -> None:
        """Refuse parts that were encoded with a different tokenizer, and set how to read and encode the rest.

        Args:
            sha256: of the tokenizer's folder.
            read: reads a source, for documents that the parts have left to the merge.

        Raises:
            StageError: a part has a different tokenizer; the message names the first one.
        """
        self._read, self._make, self._held_out = read, make, held_out
        for part, (folder, index) in enumerate(zip(self._folders, self._indices, strict=True)):
            if index["tokenizer"] != sha256:
                raise StageError(
                    f"{folder} was encoded with a different tokenizer than this build's",
                    "the same ids would mean different pieces",
                    f"remove it and run it again ({self._command} {part}/{len(self._folders)}), with the same library "
                    "versions; if they still differ, train the tokenizer in a separate stage and refer to that",
                )

    def read(self, number: int, source: Source, rejected: Rejected) -> Iterator[RecordedDocument]:
        """The documents of the stage's `number`-th source, in the order in which an undivided build reads them.

        Raises:
            StoreCorrupted: a file is damaged; the message names it.
            DataError: there are no documents.
        """
        yield from some(
            self._documents(number, source, rejected), source, rejected, "that they hold documents", Share()
        )

    def _documents(self, number: int, source: Source, rejected: Rejected) -> Iterator[RecordedDocument]:
        of_parts = [self._runs(part, number, source) for part in range(len(self._folders))]
        for _, piece, rows, records in heapq.merge(*of_parts, key=lambda run: run.place):
            lengths = piece.table[rows.start : rows.stop, ORDER].tolist()
            at = 0
            for document, length in enumerate(lengths):
                while at < len(records) and records[at][1] <= document:
                    rejected.add(*records[at][2:])
                    at += 1
                yield RecordedDocument(piece, rows.start + document, length)
            for record in records[at:]:
                rejected.add(*record[2:])

    def _runs(self, part: int, number: int, source: Source) -> Iterator[_Run]:
        """A part's runs of documents of a source, in order."""
        folder, index = self._folders[part], self._indices[part]
        for entry in index["sources"][number]:
            name = folder, entry["files"]["tokens"]["file"]
            piece = read_piece(folder, entry, verify=name not in self._verified)
            self._verified.add(name)
            yield from _runs_of(piece)
        if index["stopped"][number] is not None:
            yield from self._more(part, number, source, tuple(index["stopped"][number]))

    def _more(self, part: int, number: int, source: Source, after: tuple[int, ...]) -> Iterator[_Run]:
        """Encode the rest of a part's share of a source."""
        assert self._make is not None
        logger.warning(
            "source %s: part %d has encoded less than the mixture needs, so the merge encodes more", source.label, part
        )
        if self._pool is None:
            self._pool = EncodingPool(self._make, self.processes)
        share = Share(part, len(self._folders), number, whole_files=False)
        left = (run for run in runs(source, share, self._read) if run.place > after)
        for run, result in encoded(left, self._pool, self._held_out):
            waiting = Waiting()
            waiting.add(run, result)
            yield from _runs_of(waiting.piece())

    def submit(self, batch: EncodingTask) -> EncodingTask:
        """Return the batch of recorded documents itself, as the task for `result`."""
        return batch

    def result(self, task: EncodingTask) -> Result:
        """The recorded result of encoding the batch."""
        documents: list[Any] = task.texts
        table = np.stack([document.piece.table[document.row] for document in documents])
        taken = table[:, TAKEN] > 0
        refused = [documents[row].piece.refused[documents[row].row] for row in np.flatnonzero(~taken)]
        if task.skip_held_out:
            taken &= table[:, HELD_OUT] == 0
        kept = [documents[row].piece for row in np.flatnonzero(taken)]
        table = table[taken]
        begins, ends = table[:, BEGIN].tolist(), (table[:, BEGIN] + table[:, LENGTH]).tolist()
        ids = [piece.tokens[begin:end] for piece, begin, end in zip(kept, begins, ends, strict=True)]
        columns = {"lengths": table[:, LENGTH], "sizes": table[:, SIZE], "characters": table[:, CHARACTERS]}
        some_piece: Piece = documents[0].piece
        if some_piece.learnt is not None:
            learnt = [piece.learnt[begin:end] for piece, begin, end in zip(kept, begins, ends, strict=True)]
            columns["learnt"] = np.concatenate([np.empty(0, dtype=np.uint8), *learnt])
            columns |= {"firsts": table[:, FIRST], "cut": table[:, CUT], "unanswered": table[:, UNANSWERED]}
        everything = np.concatenate([np.empty(0, dtype=some_piece.tokens.dtype), *ids])
        return Result(Encoded(ids=everything, **columns), table[:, HELD_OUT] > 0, refused)


def _runs_of(piece: Piece) -> Iterator[_Run]:
    first = at = 0
    for run, (file, block, documents) in enumerate(piece.runs.tolist()):
        begin = at
        while at < len(piece.rejected) and piece.rejected[at][0] == run:
            at += 1
        yield _Run((file, block), piece, range(first, first + documents), piece.rejected[begin:at])
        first += documents

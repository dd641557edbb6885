"""The merge of a divided build: what its parts have recorded, read as if it were being encoded now."""

import heapq
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from minima.data.documents import HeldOut, Rejected
from minima.data.encoding import Encoded, EncodingPool, EncodingTask, Result
from minima.data.part_files import (
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
from minima.data.part_recording import Reader, Waiting, encoded, runs
from minima.data.share import Share
from minima.data.sources import read_source, some
from minima.errors import DataError, StageError
from minima.recipe.data import Source

logger = logging.getLogger("minima.data")
Encode = Callable[[EncodingTask], Result]


class RecordedDocument:
    """Stands for a document's text; as long as it, so that it takes the same place in a seeded order."""

    __slots__ = ("_length", "piece", "row")

    def __init__(self, piece: Piece, row: int, length: int) -> None:
        self.piece, self.row, self._length = piece, row, length

    def __len__(self) -> int:
        return self._length


class _Run(NamedTuple):
    """Neighbouring documents of one block: rows of a piece, and what was rejected between them."""

    place: tuple[int, int]
    piece: Piece
    rows: range
    rejected: list[tuple[int, int, str, str, str]]


def check_counts(folder: Path, count: int | None = None) -> int:
    """How many parts the build of this folder is divided into.

    Args:
        folder: of all parts.
        count: what is asked for now; told from the parts when not given.

    Raises:
        StageError: there are parts of several divisions, or of another than is asked for.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    counts = {part.total: str(folder / name) for name in names if (part := part_of(name)) is not None}
    if count is not None:
        counts.setdefault(count, f"the one asked for, of {count}")
    if len(counts) > 1:
        raise StageError(
            f"{folder} holds parts of several divisions: {', '.join(counts.values())}",
            "each division shares the records out in its own way, so together they would miss some and double others",
            f"remove those that are not wanted (or all of {folder}), or ask for the same number of parts",
        )
    if not counts:
        raise DataError(
            f"{folder} holds no part",
            "there is nothing to merge",
            "run the parts, or remove the folder to build in one process",
        )
    return next(iter(counts))


class RecordedParts:
    """All parts of a build; it is read by the mixture as a pool is, and a source's documents as a reader's.

    Attributes:
        processes: how far batches are asked for ahead.
        seconds: that the parts took, together.
    """

    def __init__(self, folder: Path, identity: str, command: str, processes: int) -> None:
        """Check that all parts are there, are of this stage, and have their files.

        Args:
            folder: of all parts.
            identity: of the stage.
            command: what runs a part, up to its number; for messages.
            processes: those of a build in one go.

        Raises:
            DataError: parts are missing; names them and the commands.
            StageError: a part was made from something else.
            StoreCorrupted: a file is missing or cut off.
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
                    f"{one} was made from another recipe or other sources, or from other records than its name says",
                    "blocks of two different builds would be mixed under one name",
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
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.__exit__(kind, error, trace)

    def prepare(self, sha256: str, read: Reader, make: Callable[[], Encode], held_out: HeldOut) -> None:
        """Refuse parts that were encoded by another tokenizer than the build's own, and say how it encodes.

        Args:
            sha256: of the tokenizer's folder.
            read: of a source, for what the parts have left to the merge.
            make: makes an encoder.
            held_out: says which documents are set aside.

        Raises:
            StageError: names the first such part.
        """
        self._read, self._make, self._held_out = read, make, held_out
        for part, (folder, index) in enumerate(zip(self._folders, self._indices, strict=True)):
            if index["tokenizer"] != sha256:
                raise StageError(
                    f"{folder} was encoded with another tokenizer than the one that this build makes",
                    "the same ids would mean different pieces",
                    f"remove it and run it again ({self._command} {part}/{len(self._folders)}), with the same versions "
                    "of the libraries; where they still differ, train the tokenizer in a stage of its own and name it",
                )

    def read(self, number: int, source: Source, rejected: Rejected) -> Iterator[RecordedDocument]:
        """The documents of the stage's n-th source, in the order in which they would be read.

        Args:
            number: of the source.
            source: the source.
            rejected: takes what gave no document.

        Raises:
            StoreCorrupted: a file is damaged; names it.
            DataError: there is not one document.
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
        """Encode what a part has left of a source."""
        assert self._make is not None
        logger.warning(
            "source %s: part %d has encoded less than the mixture takes, so the merge encodes more", source.label, part
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
        """A batch of recorded documents, for `result`."""
        return batch

    def result(self, task: EncodingTask) -> Result:
        """What encoding the batch came to."""
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

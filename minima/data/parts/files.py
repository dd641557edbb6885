"""The files of one part of a divided build: pieces of encoded documents, and an index with their checksums."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from minima.data.packing import HashedFile
from minima.disk import file_fault, file_sha256, inside, json_sha256, write_whole
from minima.errors import StoreCorrupted

INDEX = "index.json"
FORMAT = "minima-part-3"
PARTS = "parts"  # the folder of all parts, inside that of a build_data stage
_NAME = re.compile(r"part-(\d{5,})-of-(\d{5,})(\.partial)?")

# Columns of a piece's table, with one row per document: where its ids begin in the piece, how many there are, and the
# other numbers of `Encoded`; whether it is held out; its length before encoding, which determines its place in the
# seeded order; and whether the encoder accepted it.
BEGIN, LENGTH, SIZE, CHARACTERS, FIRST, CUT, UNANSWERED, HELD_OUT, ORDER, TAKEN = range(10)
COLUMNS = 10


class Part(NamedTuple):
    """One of several builds among which a stage's records are divided."""

    number: int  # from 0
    total: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"part-{self.number:05d}-of-{self.total:05d}"

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"


def part_of(name: str) -> Part | None:
    """The part whose folder, finished or not, has this name; None for any other name."""
    found = _NAME.fullmatch(name)
    return Part(int(found[1]), int(found[2])) if found else None


class Piece(NamedTuple):
    """Documents in the order of their source."""

    tokens: np.ndarray  # unsigned int array; all ids
    learnt: np.ndarray | None  # uint8 array like `tokens`; None for text
    table: np.ndarray  # int64 [documents, COLUMNS]
    runs: np.ndarray  # int64 [runs, 3]: file, block and number of documents of each run of consecutive documents
    # records that gave no document: run, n (the record came before the run's n-th document), reason, place and content
    rejected: list[tuple[int, int, str, str, str]]
    # documents that the encoder refused, by row in the table: reason, place, content
    refused: dict[int, tuple[str, str, str]]


def write_piece(folder: Path, name: str, piece: Piece) -> dict[str, Any]:
    """Write a piece and return its index entry."""
    arrays = {"tokens": piece.tokens, "learnt": piece.learnt, "table": piece.table, "runs": piece.runs}
    entry: dict[str, Any] = {"documents": len(piece.table), "tokens": len(piece.tokens)}
    files = {}
    for kind, array in arrays.items():
        if array is not None:
            file = HashedFile(folder / f"{name}.{kind}.npy")
            np.lib.format.write_array(cast(Any, file), np.ascontiguousarray(array), allow_pickle=False)
            files[kind] = file.close()
    file = HashedFile(folder / f"{name}.rejected.json")
    notes = {"rejected": piece.rejected, "refused": list(piece.refused.items())}
    file.write(json.dumps(notes, ensure_ascii=False).encode("utf-8"))
    return entry | {"files": files | {"rejected": file.close()}}


def read_piece(folder: Path, entry: dict[str, Any], verify: bool) -> Piece:
    """Open a piece; its ids and its table stay on disk until they are needed, since a merge opens many pieces at once.

    Args:
        verify: compare checksums, not only sizes.

    Raises:
        StoreCorrupted: a file is missing or damaged; the message names it.
    """
    for file in entry["files"].values():
        check_file(folder, file, verify)
    files = {kind: folder / file["file"] for kind, file in entry["files"].items()}
    notes = json.loads(files.pop("rejected").read_text(encoding="utf-8"))
    mode: Any = "r" if entry["tokens"] else None  # an empty array cannot be memory-mapped
    arrays = {kind: np.load(path, mmap_mode=mode, allow_pickle=False) for kind, path in files.items()}
    return Piece(
        np.asarray(arrays["tokens"]),
        np.asarray(arrays["learnt"]) if "learnt" in arrays else None,
        np.asarray(arrays["table"]),
        np.array(arrays["runs"]),
        [tuple(record) for record in notes["rejected"]],
        {row: tuple(record) for row, record in notes["refused"]},
    )


def check_file(folder: Path, file: dict[str, Any], verify: bool) -> None:
    """Compare a file with its index entry.

    Raises:
        StoreCorrupted: it is missing, or its size or checksum is wrong.
    """
    path = inside(folder, file["file"])
    if fault := file_fault(path, file["bytes"], file["sha256"] if verify else None):
        raise _damaged(path, fault)


def write_index(folder: Path, content: dict[str, Any]) -> None:
    """Write a part's index, the last of its files, with a checksum of its own."""
    index = {"format": FORMAT, "sha256": json_sha256(content), "content": content}
    write_whole(folder / INDEX, json.dumps(index, indent=1))


def read_index(folder: Path) -> dict[str, Any]:
    """A part's index.

    Raises:
        StoreCorrupted: it is missing or damaged.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        right = index["format"] == FORMAT and index["sha256"] == json_sha256(index["content"])
    except FileNotFoundError:
        raise _damaged(path, "is missing") from None
    except (ValueError, KeyError, TypeError):
        right = False
    if not right:
        raise _damaged(path, "does not match its own checksum or format")
    content: dict[str, Any] = index["content"]
    return content


def files_of(index: dict[str, Any]) -> list[dict[str, Any]]:
    """The index entries of all files."""
    return [file for pieces in index["sources"] for piece in pieces for file in piece["files"].values()]


def folder_sha256(folder: Path) -> str:
    """A single checksum over the names and contents of the files in a tokenizer's folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return json_sha256([(str(file.relative_to(folder)), file_sha256(file)) for file in files])


def _damaged(path: Path, how: str) -> StoreCorrupted:
    part = part_of(path.parent.name)
    return StoreCorrupted(
        f"{path} {how}",
        "blocks would be built from tokens that do not match the text",
        f"run that part again (--part {part}) to replace what is damaged; the other parts are kept",
    )

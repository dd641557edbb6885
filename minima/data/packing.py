"""Documents -> blocks: the writer of a token store."""

import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np

from minima.data.store import FORMAT, FORMATS, INDEX, STARTS_DTYPE, token_dtype
from minima.disk import disk_full_named, json_sha256

if TYPE_CHECKING:
    from minima.data.encoding import Encoded


class HashedFile:
    """A new file whose size and sha256 are known when it closes."""

    def __init__(self, path: Path) -> None:
        self.path, self.bytes = path, 0
        self._file: IO[bytes] = path.open("wb")
        self._digest = hashlib.sha256()

    def write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._digest.update(content)
        self.bytes += len(content)

    def close(self) -> dict[str, Any]:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"file": self.path.name, "bytes": self.bytes, "sha256": self._digest.hexdigest()}

    def abandon(self) -> None:
        with suppress(OSError):  # its buffer may not fit either; the folder goes away anyway
            self._file.close()


class StoreWriter:
    """Writes a token store: appends documents, cuts blocks, rotates shards.

    Everything is written to `FOLDER.partial`, which `publish` renames; leaving the `with` block without `publish`
    removes it. Memory: at most one shard's document starts and one block of tokens.

    Args:
        folder: where the store will be.
        sequence_length: tokens of one block.
        vocabulary_size: every id is below it.
        end_token: closes each document.
        shard_tokens: tokens of one shard file, rounded down to whole blocks (one at least).
        max_blocks: stop taking tokens after so many.
        format: `text`, `conversations` or `preferences`; beside the latter two, what is learnt is written.
        document_mask: whether readers are to keep the documents apart.

    Attributes:
        documents: documents that start in what was taken.
        beyond_tokens: tokens that were given when the store was full.
    """

    def __init__(
        self,
        folder: Path,
        *,
        sequence_length: int,
        vocabulary_size: int,
        end_token: int,
        shard_tokens: int = 2**28,
        max_blocks: int | None = None,
        format: str = "text",
        document_mask: bool = False,
    ) -> None:
        assert format in FORMATS, format
        self.folder, self._partial = Path(folder), Path(f"{folder}.partial")
        self._sequence_length, self._end_token = sequence_length, end_token
        self._vocabulary_size, self._dtype = vocabulary_size, np.dtype(token_dtype(vocabulary_size))
        # document starts are 32-bit positions in their shard
        self._shard_tokens = max(1, min(shard_tokens, 2**32) // sequence_length) * sequence_length
        self._max_tokens = None if max_blocks is None else max_blocks * sequence_length
        self._shards: list[dict[str, Any]] = []
        self._format, self._document_mask = format, document_mask
        self._file: HashedFile | None = None
        self._learnt_file: HashedFile | None = None
        self._starts: list[np.ndarray] = []
        self._held = np.empty(0, dtype=self._dtype)  # tokens of the block that is not full yet
        self._held_learnt = np.empty(0, dtype=np.uint8)
        self._flushed = 0  # tokens in all shards
        self._learnt_tokens = self._longest = 0
        self._open = np.empty((3, 0), dtype=np.int64)  # start, end and bytes of documents that end in it or later
        self._bytes = 0.0
        self.documents = self.beyond_tokens = 0

    def __enter__(self) -> Self:
        with disk_full_named(self.folder):
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._file, self._learnt_file):
            if file is not None:
                file.abandon()
        shutil.rmtree(self._partial, ignore_errors=True)

    @property
    def tokens(self) -> int:
        """Tokens taken so far, those of an unfinished block included."""
        return self._flushed + len(self._held)

    @property
    def full(self) -> bool:
        """Whether `max_blocks` are written."""
        return self._max_tokens is not None and self._flushed >= self._max_tokens

    def add(self, documents: "Encoded") -> int:
        """Add encoded text; returns how many of the documents start in what was taken."""
        before = self.documents
        self.append(documents.ids, documents.lengths, documents.sizes)
        return self.documents - before

    def append(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        sizes: np.ndarray,
        learnt: np.ndarray | None = None,
        filling: np.ndarray | None = None,
    ) -> int:
        """Add whole documents.

        Args:
            tokens: ids of the documents, one after the other, each closed by the end token already.
            lengths: int array; tokens of each document, its end token included.
            sizes: int array; UTF-8 bytes of each document's text, or of what is to be learnt of it.
            learnt: uint8 array like `tokens`; 1 for a token to be learnt. Given for conversations and preferences.
            filling: bool array; documents that only fill up a block, and are not counted. None are when not given.

        Returns:
            How many tokens were taken: fewer than given only when the store is full.
        """
        assert (learnt is None) == (self._format == "text")
        if not len(lengths) or self.full:
            self.beyond_tokens += len(tokens)
            return 0
        begins = self.tokens
        taken = len(tokens)
        if self._max_tokens is not None and begins + taken > self._max_tokens:
            taken = self._max_tokens - begins
            self.beyond_tokens += len(tokens) - taken
            tokens = tokens[:taken]
        starts = begins + np.concatenate([[0], np.cumsum(lengths[:-1])]).astype(np.int64)
        ends = starts + lengths
        inside = starts < begins + taken
        documents = np.stack([starts, ends, sizes])[:, inside]
        self._bytes += _bytes_between(documents, begins, begins + taken)
        self.documents += documents.shape[1] - (0 if filling is None else int(filling[inside].sum()))
        if learnt is not None:
            learnt = np.concatenate([self._held_learnt, learnt[:taken].astype(np.uint8)])
            real = lengths if filling is None else lengths[~filling]
            self._longest = max(self._longest, int(real.max(initial=0)))
        with disk_full_named(self.folder):
            documents = np.concatenate([self._open, documents], axis=1)
            self._take(np.asarray(tokens, dtype=self._dtype), learnt, documents)
        return taken

    def _take(self, tokens: np.ndarray, learnt: np.ndarray | None, documents: np.ndarray) -> None:
        """Write what fills blocks, shard by shard, and hold the rest; `learnt` begins with what is held."""
        stream = np.concatenate([self._held, tokens]) if len(self._held) else tokens
        pending = documents[0, documents[0] >= self._flushed]
        whole = len(stream) // self._sequence_length * self._sequence_length
        written = 0
        while written < whole:
            if self._file is None:
                self._file = HashedFile(self._partial / f"tokens-{len(self._shards):05d}.bin")
                self._shard_begin = self._flushed
            room = self._shard_begin + self._shard_tokens - self._flushed
            piece = stream[written : min(whole, written + room)]
            self._file.write(np.ascontiguousarray(piece).view(np.uint8).data)
            if learnt is not None:
                self._write_learnt(learnt[written : written + len(piece)])
            written += len(piece)
            self._flushed += len(piece)
            split = int(np.searchsorted(pending, self._flushed))
            self._starts.append((pending[:split] - self._shard_begin).astype(STARTS_DTYPE))
            pending = pending[split:]
            if self._flushed == self._shard_begin + self._shard_tokens:
                self._close_shard()
        self._held, self._open = stream[whole:].copy(), documents[:, documents[1] > self._flushed]
        if learnt is not None:
            self._held_learnt = learnt[whole:].copy()

    def _write_learnt(self, learnt: np.ndarray) -> None:
        if self._learnt_file is None:
            self._learnt_file = HashedFile(self._partial / f"learnt-{len(self._shards):05d}.bin")
        self._learnt_file.write(learnt.data)
        self._learnt_tokens += int(learnt.sum())

    def _close_shard(self) -> None:
        assert self._file is not None
        shard = self._file.close() | {"tokens": self._flushed - self._shard_begin}
        starts = HashedFile(self._partial / f"starts-{len(self._shards):05d}.bin")
        starts.write(np.concatenate(self._starts).tobytes())
        shard |= {"starts": starts.close()}
        if self._learnt_file is not None:
            shard |= {"learnt": self._learnt_file.close()}
        self._shards.append(shard)
        self._file, self._learnt_file, self._starts = None, None, []

    def finish(self) -> dict[str, Any]:
        """Close the last shard and write the index, still under the temporary name.

        Returns:
            `blocks`, `tokens`, `documents`, `bytes` of the store (and `learnt_tokens` where not all are to be learnt),
            and `dropped_tokens`, the tail that fills no block.
        """
        size = self._bytes - _bytes_between(self._open, self._flushed, self.tokens)
        with disk_full_named(self.folder):
            if self._file is not None:
                self._close_shard()
            documents = self.documents - int((self._open[0] >= self._flushed).sum())
            counts = {"tokens": self._flushed, "documents": documents, "bytes": round(size)}
            shape = {"format_of_documents": self._format, "document_mask": self._document_mask}
            if self._format != "text":
                counts |= {"learnt_tokens": self._learnt_tokens}
                shape |= {"longest": self._longest}
            index = {
                "format": FORMAT,
                "dtype": self._dtype.str,
                "sequence_length": self._sequence_length,
                "vocabulary_size": self._vocabulary_size,
                "end_token": self._end_token,
                **shape,
                **counts,
                "shards": self._shards,
            }
            with (self._partial / INDEX).open("w", encoding="utf-8") as file:
                json.dump(index | {"index_sha256": json_sha256(index)}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
        blocks = self._flushed // self._sequence_length
        return {"blocks": blocks, **counts, "dropped_tokens": len(self._held)}

    def publish(self) -> None:
        """Give the finished store its name, in place of an older one."""
        with disk_full_named(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)
            os.replace(self._partial, self.folder)


def _bytes_between(documents: np.ndarray, low: int, high: int) -> float:
    """UTF-8 bytes of the text in tokens [low, high): a document's bytes are spread evenly over its tokens."""
    starts, ends, sizes = documents
    overlap = np.clip(np.minimum(ends, high) - np.maximum(starts, low), 0, None)
    return float((sizes * (overlap / (ends - starts))).sum())

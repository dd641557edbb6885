"""The writer of a token store, which divides documents into blocks."""

import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np

from minima.data.store import FORMAT, FORMATS, INDEX, STARTS_DTYPE, token_dtype
from minima.disk import json_sha256, write_whole
from minima.disk_errors import disk_full_named

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
        with suppress(OSError):  # there may be no space for its buffer either; the folder is removed anyway
            self._file.close()


class StoreWriter:
    """Writes a token store: appends documents, divides them into blocks, rotates shards.

    Everything is written to `FOLDER.partial`, which `publish` renames; leaving the `with` block without `publish`
    removes it. It holds at most one shard's document starts and one block of tokens in memory.

    Args:
        sequence_length: tokens per block.
        vocabulary_size: every id is below it.
        end_token: closes each document.
        shard_tokens: tokens per shard file, rounded down to whole blocks (at least one).
        max_blocks: stop taking tokens after this many blocks.
        format: `text`, `conversations` or `preferences`; for the latter two a mask of trainable tokens is also written.
        document_mask: whether readers should keep the documents apart.

    Attributes:
        documents: number of documents that start in the tokens taken.
        beyond_tokens: number of tokens that were given when the store was full.
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
        self._held = np.empty(0, dtype=self._dtype)  # tokens of the unfinished block
        self._flushed = 0  # tokens in all shards
        self._learnt_tokens = self._longest = 0
        self._open = np.empty((3, 0), dtype=np.int64)  # start, end, bytes of documents that end in that block or later
        self._bytes = 0.0
        self.documents = self.beyond_tokens = 0

    def __enter__(self) -> Self:
        with disk_full_named(self.folder):
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
        return self

    def __exit__(self, *failure: Any) -> None:
        for file in (self._file, self._learnt_file):
            if file is not None:
                file.abandon()
        shutil.rmtree(self._partial, ignore_errors=True)

    @property
    def tokens(self) -> int:
        """Number of tokens taken so far, those of the unfinished block included."""
        return self._flushed + len(self._held)

    @property
    def full(self) -> bool:
        """Whether `max_blocks` blocks are written."""
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
            tokens: concatenated ids of the documents, each already closed by the end token.
            lengths: int array; tokens of each document, its end token included.
            sizes: int array; UTF-8 bytes of each document's text, or of its trainable part.
            learnt: uint8 array like `tokens`; 1 for trainable tokens. For conversations and preferences only, of which
                each call adds whole blocks.
            filling: bool array; marks documents that are padding and not counted. None if there is no padding.

        Returns:
            The number of tokens taken, which is less than given only if the store is full.
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
            assert not len(self._held) and not len(tokens) % self._sequence_length, "whole blocks"
            learnt = learnt[:taken].astype(np.uint8)
            real = lengths if filling is None else lengths[~filling]
            self._longest = max(self._longest, int(real.max(initial=0)))
        with disk_full_named(self.folder):
            documents = np.concatenate([self._open, documents], axis=1)
            self._take(np.asarray(tokens, dtype=self._dtype), learnt, documents)
        return taken

    def _take(self, tokens: np.ndarray, learnt: np.ndarray | None, documents: np.ndarray) -> None:
        """Write whole blocks, shard by shard, and hold the rest."""
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
                if self._learnt_file is None:
                    self._learnt_file = HashedFile(self._partial / f"learnt-{len(self._shards):05d}.bin")
                mask = learnt[written : written + len(piece)]
                self._learnt_file.write(mask.data)
                self._learnt_tokens += int(mask.sum())
            written += len(piece)
            self._flushed += len(piece)
            split = int(np.searchsorted(pending, self._flushed))
            self._starts.append((pending[:split] - self._shard_begin).astype(STARTS_DTYPE))
            pending = pending[split:]
            if self._flushed == self._shard_begin + self._shard_tokens:
                self._close_shard()
        self._held, self._open = stream[whole:].copy(), documents[:, documents[1] > self._flushed]

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
            `blocks`, `tokens`, `documents`, `bytes` of the store (and `learnt_tokens` if there is a mask of trainable
            tokens), and `dropped_tokens`, the tail that does not fill a block.
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
            write_whole(self._partial / INDEX, json.dumps(index | {"index_sha256": json_sha256(index)}, indent=1))
        blocks = self._flushed // self._sequence_length
        return {"blocks": blocks, **counts, "dropped_tokens": len(self._held)}

    def publish(self) -> None:
        """Move the finished store to its final name, replacing an older one."""
        with disk_full_named(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)
            os.replace(self._partial, self.folder)


def _bytes_between(documents: np.ndarray, low: int, high: int) -> float:
    """UTF-8 bytes of the text in tokens [low, high), with a document's bytes spread evenly over its tokens."""
    starts, ends, sizes = documents
    overlap = np.clip(np.minimum(ends, high) - np.maximum(starts, low), 0, None)
    return float((sizes * (overlap / (ends - starts))).sum())

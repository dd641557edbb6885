"""Token blocks on disk: memory-mapped shards, an index, and a checksum for every file."""

import json
import mmap
import resource
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from minima.disk import file_fault, file_sha256, inside, json_sha256
from minima.disk_errors import is_damage
from minima.errors import DataError, StoreCorrupted

FORMAT = "minima-tokens-1"
FORMATS = ("text", "conversations", "preferences")
INDEX = "index.json"
STARTS_DTYPE = "<u4"  # a shard holds at most 2^32 tokens
# A mapped file keeps a file descriptor open. Processes are often limited to 1,024 of them, and 126e9 tokens are 470
# shards of two or three files each. So of each kind of file, only this share of the limit stays mapped.
_MAPPED_SHARE = 1 / 16


def token_dtype(vocabulary_size: int) -> str:
    """Two bytes per token if every id fits, else four; little-endian."""
    return "<u2" if vocabulary_size <= 1 << 16 else "<u4"


class TokenStore:
    """Blocks of `sequence_length` tokens: a stream of documents, each closed by the end token, divided into blocks.

    A shard file holds the raw tokens of whole blocks. Files beside it hold the positions at which its documents start
    and, for conversations and preferences, one byte per token that says whether it is trainable. Nothing is read before
    it is needed, so 126e9 tokens (252 GB at two bytes per token) open instantly.

    In a store of conversations or preferences every document is contained in one block, and the rest of a block is
    padding: one more document, of end tokens, that is not trained on. For preferences, documents 2k and 2k + 1 of a
    block are the chosen and the rejected answer of its k-th pair, each with the conversation that it answers.

    Attributes:
        folder: where it is stored.
        sequence_length: tokens per block.
        vocabulary_size: every id is below it.
        end_token: the id that closes a document.
        tokens: number of tokens, end tokens included.
        num_documents: number of documents that start in the store, without padding.
        bytes: UTF-8 bytes of the text of these tokens, or of the trainable ones; a document that the end of the last
            block cuts counts in proportion.
        format: `text`, `conversations` or `preferences`.
        document_mask: whether its documents should be kept apart.
        longest: tokens of the longest document, which bounds attention and positions; without a mask, a whole block.
        learnt_tokens: number of trainable tokens; for text, all.
    """

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder = folder
        self.sequence_length: int = index["sequence_length"]
        self.vocabulary_size: int = index["vocabulary_size"]
        self.end_token: int = index["end_token"]
        self.tokens: int = index["tokens"]
        self.num_documents: int = index["documents"]
        self.bytes: int = index["bytes"]
        self.format: str = index.get("format_of_documents", "text")
        self.document_mask: bool = index.get("document_mask", False)
        self.longest: int = index.get("longest", self.sequence_length) if self.document_mask else self.sequence_length
        self.learnt_tokens: int = index.get("learnt_tokens", self.tokens)
        self._dtype = np.dtype(index["dtype"])
        self._shards: list[dict[str, Any]] = index["shards"]
        blocks = [shard["tokens"] // self.sequence_length for shard in self._shards]
        self._first_block = np.cumsum([0, *blocks], dtype=np.int64)
        self._forget_maps()

    @classmethod
    def open(cls, folder: Path) -> "TokenStore":
        """Open the store in `folder` after checking the size of every file (`verify` checks their content).

        Raises:
            DataError: there is no store.
            StoreCorrupted: a file is missing or has the wrong size.
        """
        folder = Path(folder)
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                f"{folder} holds no token store: {INDEX} is missing",
                "a store is complete only once its index is written",
                "give the folder of a finished build_data stage, or run that stage again",
            ) from None
        except OSError as error:
            if not isinstance(error, IsADirectoryError) and not is_damage(error):
                raise
            raise _damaged(folder / INDEX, f"cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise _damaged(folder / INDEX, f"is not valid JSON ({error})") from None
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            said = index.get("format") if isinstance(index, dict) else index
            raise _damaged(folder / INDEX, f"has format {said!r}, but {FORMAT!r} was expected")
        own = index.pop("index_sha256", None)  # absent in stores of earlier versions
        if own is not None and own != json_sha256(index):
            raise _damaged(folder / INDEX, "does not match its own checksum")
        try:
            store = cls(folder, index)
            files = [(file["file"], int(file["bytes"]), str(file["sha256"])) for file in store._files()]
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, SyntaxError) as error:
            raise _damaged(folder / INDEX, f"is incomplete ({type(error).__name__}: {error})") from None
        for name, size, _ in files:
            path = inside(folder, name)
            if fault := file_fault(path, size):
                raise _damaged(path, fault)
        return store

    def __len__(self) -> int:
        """The number of blocks."""
        return int(self._first_block[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_map")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._forget_maps()

    def _forget_maps(self) -> None:
        """Reset the caches of mapped files; of each kind, only the most recently used stay mapped."""
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most = None if soft == resource.RLIM_INFINITY else max(1, int(soft * _MAPPED_SHARE))
        self._map = lru_cache(most)(self._open_shard)
        self._map_learnt = lru_cache(most)(self._open_learnt)
        self._map_starts = lru_cache(most)(self._open_starts)

    @property
    def file_bytes(self) -> int:
        """Total size of all files except the index."""
        return sum(file["bytes"] for file in self._files())

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per trainable token: nats per token / (ln 2 x this) gives bits per byte."""
        return self.bytes / self.learnt_tokens

    def blocks(self, indices: np.ndarray) -> np.ndarray:
        """Some blocks, in the given order.

        Args:
            indices: block numbers, int array [n]; may contain duplicates.

        Returns:
            int64 array [n, sequence_length].

        Raises:
            IndexError: a number is negative or not below `len(store)`.
        """
        return self._gather(indices, self._map, np.int64)

    def learnt(self, indices: np.ndarray) -> np.ndarray | None:
        """Which tokens of some blocks are trainable.

        Args:
            indices: block numbers, int array [n].

        Returns:
            bool array [n, sequence_length]; None for text, where all are.
        """
        return None if self.format == "text" else self._gather(indices, self._map_learnt, np.bool_)

    def documents(self, indices: np.ndarray) -> np.ndarray:
        """The document of its block that each token belongs to, counted from 0; a block's start begins its first one.

        Args:
            indices: block numbers, int array [n].

        Returns:
            int64 array [n, sequence_length].
        """
        begins = np.zeros((len(indices), self.sequence_length), dtype=np.int64)
        for row, block in enumerate(np.asarray(indices, dtype=np.int64).tolist()):
            begins[row, self.document_starts(block, block + 1) - block * self.sequence_length] = 1
        begins[:, 0] = 0
        return begins.cumsum(axis=1)

    def _gather(self, indices: np.ndarray, shard_of: Any, dtype: Any) -> np.ndarray:
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"blocks {indices.min()} to {indices.max()} of a store with {len(self)}")
        out = np.empty((len(indices), self.sequence_length), dtype=dtype)
        shards = np.searchsorted(self._first_block, indices, side="right") - 1
        for shard in np.unique(shards):
            rows = shards == shard
            out[rows] = shard_of(int(shard)).read(indices[rows] - self._first_block[shard])
        return out

    def document_starts(self, first_block: int = 0, last_block: int | None = None) -> np.ndarray:
        """Where documents start in a range of blocks.

        Args:
            last_block: one past the last; the end of the store if not given.

        Returns:
            int64 positions in tokens from the store's first token, ascending. The start of a block is included only
            if a document begins there.
        """
        last_block = len(self) if last_block is None else last_block
        low, high = first_block * self.sequence_length, last_block * self.sequence_length
        found = [np.empty(0, dtype=np.int64)]
        first_shard = max(0, int(np.searchsorted(self._first_block, first_block, side="right")) - 1)
        last_shard = int(np.searchsorted(self._first_block[:-1], last_block))
        for number in range(first_shard, last_shard):
            shard, first = self._shards[number], int(self._first_block[number]) * self.sequence_length
            if shard["starts"]["bytes"]:
                starts = self._map_starts(number)
                # In the array's own dtype: for any other, numpy would copy the whole array, for every block.
                ends = np.array([max(0, low - first), min(high - first, shard["tokens"]) - 1], dtype=STARTS_DTYPE)
                left, right = np.searchsorted(starts, ends[0]), np.searchsorted(starts, ends[1], side="right")
                found.append(first + starts[left:right].astype(np.int64))
        return np.concatenate(found)

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Read every file and compare its checksum.

        Args:
            part: check only files whose place modulo `parts` is this, the largest file first, so that ranks can share
                the reading evenly.
            parts: the number of ranks that share it.

        Raises:
            StoreCorrupted: a file is damaged, or the disk cannot read it; the message names the first one, with its
                expected and its actual sha256 or the disk's error.
        """
        for file in sorted(self._files(), key=lambda file: -file["bytes"])[part::parts]:
            path = self.folder / file["file"]
            try:
                fault = file_fault(path, file["bytes"], file["sha256"])
            except OSError as error:
                if not is_damage(error):
                    raise
                raise _damaged(path, f"cannot be read: {error.strerror}") from error
            if fault:
                raise _damaged(path, fault)

    def sha256(self) -> str:
        """A checksum for the whole store: that of its index, which contains those of all files."""
        return file_sha256(self.folder / INDEX)

    def _files(self) -> list[dict[str, Any]]:
        return [file for shard in self._shards for file in (shard, shard["starts"], shard.get("learnt")) if file]

    def _open_shard(self, number: int) -> "_Rows":
        return _Rows(self.folder / self._shards[number]["file"], self._dtype, self.sequence_length)

    def _open_starts(self, number: int) -> np.ndarray:
        return np.memmap(self.folder / self._shards[number]["starts"]["file"], dtype=STARTS_DTYPE, mode="r")

    def _open_learnt(self, number: int) -> "_Rows":
        path = self.folder / self._shards[number]["learnt"]["file"]
        return _Rows(path, np.dtype(np.uint8), self.sequence_length)


class _Rows:
    """A mapped file whose rows are read in random order.

    The system is told so, since otherwise it reads far beyond each row: 128 kB by default, and some file systems
    megabytes, for rows of a few kilobytes. It is also told which rows come next, since otherwise it would read them one
    after another, and page by page.
    """

    def __init__(self, path: Path, dtype: np.dtype, length: int) -> None:
        with path.open("rb") as file:
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._advise(mmap.MADV_RANDOM)
        self._rows = np.frombuffer(self._mapped, dtype=dtype).reshape(-1, length)

    def read(self, numbers: np.ndarray) -> np.ndarray:
        size = self._rows[:1].nbytes
        for first in (numbers * size).tolist():
            page = first - first % mmap.PAGESIZE
            self._advise(mmap.MADV_WILLNEED, page, first + size - page)
        return self._rows[numbers]

    def _advise(self, *advice: int) -> None:
        with suppress(OSError):  # a sandbox may not know it
            self._mapped.madvise(*advice)


def _damaged(path: Path, how: str) -> StoreCorrupted:
    return StoreCorrupted(
        f"{path} {how}",
        "a model would be trained or evaluated on tokens that do not match the text",
        "run the build_data stage again (remove its folder first), or copy the file again from its origin",
    )

"""Token blocks on disk: memory-mapped shards, an index, and a checksum for every file."""

import json
import resource
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from minima.disk import file_sha256, inside, json_sha256
from minima.errors import DataError, StoreCorrupted

FORMAT = "minima-tokens-1"
FORMATS = ("text", "conversations", "preferences")
INDEX = "index.json"
STARTS_DTYPE = "<u4"  # a shard holds at most 2^32 tokens
# A mapped file keeps a descriptor, of which a process often has 1,024, and 126e9 tokens are 470 shards of two or three
# files each: of each kind, this share of what the process may have stays mapped.
_MAPPED_SHARE = 1 / 16


def token_dtype(vocabulary_size: int) -> str:
    """Two bytes a token where every id fits, else four; little-endian."""
    return "<u2" if vocabulary_size <= 1 << 16 else "<u4"


class TokenStore:
    """Blocks of `sequence_length` tokens: one stream of documents, each closed by the end token, cut into blocks.

    A shard is the raw tokens of whole blocks; beside it lie the positions at which its documents start, and for
    conversations and preferences one byte a token that says whether it is to be learnt. Nothing is read before it is
    asked for, so 126e9 tokens (252 GB at two bytes a token) open at once.

    In a store of conversations or preferences every document lies whole in one block, and what a block has left is one
    more document, of end tokens, of which nothing is learnt. Of preferences, documents 2k and 2k + 1 of a block are
    the chosen and the rejected answer of its k-th pair, each with the conversation that it answers.

    Attributes:
        folder: where it lies.
        sequence_length: tokens of one block.
        vocabulary_size: every id is below it.
        end_token: the id that closes a document.
        tokens: all tokens, end tokens included.
        num_documents: documents that start in the store; what fills up a block is not one.
        bytes: UTF-8 bytes of the text whose tokens these are, or are to be learnt; of a document that the last block
            cuts, its share.
        format: `text`, `conversations` or `preferences`.
        document_mask: whether its documents are to be kept apart.
        longest: tokens of the longest document that attention and positions run over; a whole block without a mask.
        learnt_tokens: tokens to be learnt; all of them in text.
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
        """The store in `folder`, after a look at every file's size (`verify` reads their content).

        Raises:
            DataError: there is no store.
            StoreCorrupted: a file is missing, or not of the size that was written.
        """
        folder = Path(folder)
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(
                f"{folder} holds no token store: {INDEX} is missing",
                "a store is complete only once its index is written",
                "give the folder of a finished build_data stage, or run that stage again",
            ) from None
        except ValueError as error:
            raise _damaged(folder / INDEX, f"is not valid JSON ({error})") from None
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            said = index.get("format") if isinstance(index, dict) else index
            raise _damaged(folder / INDEX, f"says format {said!r}, expected {FORMAT!r}")
        own = index.pop("index_sha256", None)  # those of earlier versions have none
        if own is not None and own != json_sha256(index):
            raise _damaged(folder / INDEX, "does not have the checksum that it says")
        try:
            store = cls(folder, index)
            files = [(file["file"], int(file["bytes"]), str(file["sha256"])) for file in store._files()]
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, SyntaxError) as error:
            raise _damaged(folder / INDEX, f"is not whole ({type(error).__name__}: {error})") from None
        for name, size, _ in files:
            path = inside(folder, name)
            if not path.exists():
                raise _damaged(path, "is missing")
            if path.stat().st_size != size:
                raise _damaged(path, f"has {path.stat().st_size} bytes, {size} were written")
        return store

    def __len__(self) -> int:
        """Blocks."""
        return int(self._first_block[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_map")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._forget_maps()

    def _forget_maps(self) -> None:
        """Begin to map files; of each kind, only the latest stay mapped."""
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most = None if soft == resource.RLIM_INFINITY else max(1, int(soft * _MAPPED_SHARE))
        self._map = lru_cache(most)(self._open_shard)
        self._map_learnt = lru_cache(most)(self._open_learnt)
        self._map_starts = lru_cache(most)(self._open_starts)

    @property
    def file_bytes(self) -> int:
        """Bytes of all its files but the index."""
        return sum(file["bytes"] for file in self._files())

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for one token to be learnt: nats a token / (ln 2 x this) are bits per byte."""
        return self.bytes / self.learnt_tokens

    def blocks(self, indices: np.ndarray) -> np.ndarray:
        """Some blocks, in the order asked for.

        Args:
            indices: block numbers, int array [n]; one may come more than once.

        Returns:
            int64 array [n, sequence_length].

        Raises:
            IndexError: a number is negative or not below `len(store)`.
        """
        return self._gather(indices, self._map, np.int64)

    def learnt(self, indices: np.ndarray) -> np.ndarray | None:
        """Which tokens of some blocks are to be learnt.

        Args:
            indices: block numbers, int array [n].

        Returns:
            bool array [n, sequence_length]; None for text, of which all are.
        """
        return None if self.format == "text" else self._gather(indices, self._map_learnt, np.bool_)

    def documents(self, indices: np.ndarray) -> np.ndarray:
        """Which document of its block each token belongs to, counted from 0; a block's start begins its first one.

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
            out[rows] = shard_of(int(shard))[indices[rows] - self._first_block[shard]]
        return out

    def document_starts(self, first_block: int = 0, last_block: int | None = None) -> np.ndarray:
        """Where documents start in a run of blocks.

        Args:
            first_block: the first block.
            last_block: one past the last; the store's end when not given.

        Returns:
            int64 positions in tokens from the store's first token, ascending. A block's own start is in it only if
            a document begins there.
        """
        last_block = len(self) if last_block is None else last_block
        low, high = first_block * self.sequence_length, last_block * self.sequence_length
        found = [np.empty(0, dtype=np.int64)]
        for number, shard in enumerate(self._shards):
            first = int(self._first_block[number]) * self.sequence_length
            if first < high and low < first + shard["tokens"] and shard["starts"]["bytes"]:
                starts = self._map_starts(number)
                # Of the list's own type: for any other, numpy would copy the whole list, for every block.
                ends = np.array([max(0, low - first), min(high - first, shard["tokens"]) - 1], dtype=STARTS_DTYPE)
                left, right = np.searchsorted(starts, ends[0]), np.searchsorted(starts, ends[1], side="right")
                found.append(first + starts[left:right].astype(np.int64))
        return np.concatenate(found)

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Read every file and compare its checksum.

        Args:
            part: look at every file whose number leaves this remainder, so that ranks can share the reading.
            parts: divisor.

        Raises:
            StoreCorrupted: names the first damaged file, the expected and the actual sha256.
        """
        for file in list(self._files())[part::parts]:
            actual = file_sha256(self.folder / file["file"])
            if actual != file["sha256"]:
                raise _damaged(self.folder / file["file"], f"has sha256 {actual}, {file['sha256']} was written")

    def sha256(self) -> str:
        """One checksum for the whole store: that of its index, which holds those of all files."""
        return file_sha256(self.folder / INDEX)

    def _files(self) -> list[dict[str, Any]]:
        return [file for shard in self._shards for file in (shard, shard["starts"], shard.get("learnt")) if file]

    def _open_shard(self, number: int) -> np.ndarray:
        path = self.folder / self._shards[number]["file"]
        return np.memmap(path, dtype=self._dtype, mode="r").reshape(-1, self.sequence_length)

    def _open_starts(self, number: int) -> np.ndarray:
        return np.memmap(self.folder / self._shards[number]["starts"]["file"], dtype=STARTS_DTYPE, mode="r")

    def _open_learnt(self, number: int) -> np.ndarray:
        path = self.folder / self._shards[number]["learnt"]["file"]
        return np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, self.sequence_length)


def _damaged(path: Path, how: str) -> StoreCorrupted:
    return StoreCorrupted(
        f"{path} {how}",
        "a model would be trained or judged on tokens that are not the text's",
        "run the build_data stage again (remove its folder first), or copy the file again from where it was made",
    )

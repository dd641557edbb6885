"""Texts -> token ids, over worker processes."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from minima.data.documents import HeldOut
from minima.data.store import token_dtype
from minima.errors import DataError

# Documents given to the tokenizer in one call. Thousands of short ones in a call cost a third more than 64: what it
# returns for them no longer fits the processor's caches.
_AT_ONCE = 64


class Encoded(NamedTuple):
    """Documents as ids, one after the other, each closed by the end token.

    Attributes:
        ids: unsigned int array, all documents.
        lengths: int64 array; ids of each document, its end token included.
        sizes: int64 array; UTF-8 bytes of each document's text.
        characters: int64 array; of each document's text.
    """

    ids: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray
    characters: np.ndarray

    def part(self, begin: int, end: int) -> "Encoded":
        """Documents `begin` to `end - 1`."""
        first, last = int(self.lengths[:begin].sum()), int(self.lengths[:end].sum())
        return Encoded(self.ids[first:last], *(column[begin:end] for column in self[1:]))

    def select(self, documents: np.ndarray) -> "Encoded":
        """The documents where the bool array is true."""
        return Encoded(self.ids[np.repeat(documents, self.lengths)], *(column[documents] for column in self[1:]))


class Batch(NamedTuple):
    """One task: texts, and what to do about held-out ones.

    Attributes:
        texts: documents.
        held_out: which of them are set aside.
        skip_held_out: leave those out altogether, as a second pass does.
    """

    texts: list[str]
    held_out: HeldOut
    skip_held_out: bool = False


class Encoder:
    """Encodes with the tokenizer of a folder. Names of special tokens in a text are text: none can be forged.

    Args:
        folder: holds `tokenizer.json`; else transformers loads what is there, which is slower.
        end_token: the id put after each document.
        vocabulary_size: decides two or four bytes an id.
    """

    def __init__(self, folder: Path, end_token: int, vocabulary_size: int) -> None:
        self._end_token, self._dtype = end_token, np.dtype(token_dtype(vocabulary_size))
        self._encode: Callable[[list[str]], list[list[int]]]
        if (folder / "tokenizer.json").is_file():
            from tokenizers import Tokenizer  # without transformers, a worker starts in a tenth of the time

            fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
            fast.encode_special_tokens = True
            fast.no_truncation()
            fast.no_padding()
            self._encode = lambda texts: [
                encoding.ids for encoding in fast.encode_batch_fast(texts, add_special_tokens=False)
            ]
        else:
            from minima.data.tokenizer import load_tokenizer

            slow = load_tokenizer(folder)
            self._encode = lambda texts: [
                slow.encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts
            ]

    def __call__(self, batch: Batch) -> tuple[Encoded, np.ndarray]:
        """Encode documents; the bool array says which are held out."""
        texts, contents = batch.texts, [text.encode("utf-8") for text in batch.texts]
        held_out = batch.held_out.mask(contents)
        if batch.skip_held_out and held_out.any():
            keep = np.flatnonzero(~held_out).tolist()
            texts, contents = [texts[i] for i in keep], [contents[i] for i in keep]
            held_out = np.zeros(len(texts), dtype=bool)
        pieces, lengths = [np.empty(0, dtype=self._dtype)], []
        for begin in range(0, len(texts), _AT_ONCE):
            stream: list[int] = []
            for document in self._encode(texts[begin : begin + _AT_ONCE]):
                stream += document
                stream.append(self._end_token)
                lengths.append(len(document) + 1)
            pieces.append(np.array(stream, dtype=self._dtype))
        counts = np.array(lengths, dtype=np.int64)
        return Encoded(np.concatenate(pieces), counts, _lengths(contents), _lengths(texts)), held_out


def _lengths(items: list[Any]) -> np.ndarray:
    return np.fromiter(map(len, items), dtype=np.int64, count=len(items))


_encoder: Encoder | None = None  # one for each worker process


def _start_worker(folder: Path, end_token: int, vocabulary_size: int) -> None:
    global _encoder
    os.putenv("TOKENIZERS_PARALLELISM", "false")  # there is a process for each core; threads on top only contend
    _encoder = Encoder(folder, end_token, vocabulary_size)


def _encode_in_worker(batch: Batch) -> tuple[Encoded, np.ndarray]:
    assert _encoder is not None
    return _encoder(batch)


class EncodingPool:
    """Worker processes that encode lists of texts; results come in the order asked for.

    Args:
        folder: of the tokenizer.
        end_token: the id put after each document.
        vocabulary_size: decides two or four bytes an id.
        processes: workers. With one, this process encodes (and the tokenizer's own threads may help it).
    """

    def __init__(self, folder: Path, end_token: int, vocabulary_size: int, processes: int) -> None:
        self.processes = processes
        self._encoder = self._pool = None
        if processes == 1:
            self._encoder = Encoder(folder, end_token, vocabulary_size)
        else:  # spawned, not forked: the tokenizer and pyarrow keep threads
            self._pool = ProcessPoolExecutor(
                processes,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(folder, end_token, vocabulary_size),
            )
            for _ in range(processes):  # they start while the first texts are being read
                self._pool.submit(_encode_in_worker, Batch([], HeldOut(0.0, 0)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, batch: Batch) -> "Future[tuple[Encoded, np.ndarray]] | Batch":
        """Ask for texts to be encoded; give what comes back to `result`."""
        if self._pool is None:
            return batch
        try:
            return self._pool.submit(_encode_in_worker, batch)
        except BrokenProcessPool as error:
            raise _worker_died(self.processes) from error

    def result(self, task: Any) -> tuple[Encoded, np.ndarray]:
        """Wait for it.

        Raises:
            DataError: a worker process died.
        """
        if self._encoder is not None:
            return self._encoder(task)
        try:
            return task.result()
        except BrokenProcessPool as error:
            raise _worker_died(self.processes) from error


def _worker_died(processes: int) -> DataError:
    return DataError(
        f"one of {processes} encoding processes ended by itself",
        "its documents would be missing",
        "look for an out-of-memory kill in the system's log and give fewer `processes`; a script of your own that "
        'builds data needs `if __name__ == "__main__":`, since workers import it',
    )

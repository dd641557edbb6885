"""Encoding of texts, conversations or pairs into token ids by worker processes."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from minima.data import long_texts
from minima.data.documents import HeldOut
from minima.data.store import token_dtype
from minima.errors import DataError

# Documents per tokenizer call. Thousands of short documents per call are a third slower than 64, because the results no
# longer fit the CPU's caches.
_AT_ONCE = 64


class Encoded(NamedTuple):
    """Concatenated ids of documents; a text ends with the end token, and a pair of answers is one document."""

    ids: np.ndarray  # unsigned int array, all documents
    lengths: np.ndarray  # int64 array; number of ids of each document, its begin and end token included
    sizes: np.ndarray  # int64 array; UTF-8 bytes of each document's text, or of its trainable part
    characters: np.ndarray  # int64 array; characters of each document's text
    learnt: np.ndarray | None = None  # uint8 array like `ids`; 1 for trainable tokens. None for text, where all are
    # int64 array; for a pair, the number of ids of its first answer with the prompt; else all. None for text
    firsts: np.ndarray | None = None
    # int64 array; number of turns cut from the end of a conversation that is too long. None for text
    cut: np.ndarray | None = None
    # int64 array; number of turns left out because they have no answer. None for text
    unanswered: np.ndarray | None = None

    def part(self, begin: int, end: int) -> "Encoded":
        """Documents `begin` to `end - 1`."""
        first, last = int(self.lengths[:begin].sum()), int(self.lengths[:end].sum())
        return self._each(lambda tokens: tokens[first:last], lambda column: column[begin:end])

    def select(self, documents: np.ndarray) -> "Encoded":
        """The documents for which the bool array is True."""
        tokens = np.repeat(documents, self.lengths)
        return self._each(lambda column: column[tokens], lambda column: column[documents])

    @classmethod
    def joined(cls, parts: "list[Encoded]") -> "Encoded":
        """Concatenate several; an empty list gives no documents."""
        nothing = np.empty(0, dtype=np.int64)
        if not parts:
            return cls(*[nothing] * len(cls._fields))
        columns: list[Any] = [
            None if column[0] is None else np.concatenate(column) for column in zip(*parts, strict=True)
        ]
        return cls(*columns)

    def _each(self, of_tokens: Callable, of_documents: Callable) -> "Encoded":
        columns: list[Any] = [
            column if column is None else (of_tokens if name in ("ids", "learnt") else of_documents)(column)
            for name, column in zip(self._fields, self, strict=True)
        ]
        return Encoded(*columns)


class EncodingTask(NamedTuple):
    """One task: documents, and what to do about held-out ones."""

    texts: list[str]  # texts, or packed conversations or pairs
    held_out: HeldOut  # the rule that says which of them are held out
    skip_held_out: bool = False  # drop those altogether, as later passes do


class Result(NamedTuple):
    """The result of encoding a batch."""

    documents: Encoded  # those that could be encoded
    held_out: np.ndarray  # bool array; which of these are held out
    rejected: list[tuple[str, str, str]]  # reason, place and content of the others


class Encoder:
    """Encodes with the tokenizer of a folder. Names of special tokens in a text are treated as plain text.

    Args:
        folder: holds `tokenizer.json`; without it transformers loads the tokenizer, which is slower.
        end_token: the id put after each document.
        vocabulary_size: decides between two and four bytes per id.
        begin_token: the id put before each document, if given.
    """

    def __init__(self, folder: Path, end_token: int, vocabulary_size: int, begin_token: int | None = None) -> None:
        self._end_token, self._dtype = end_token, np.dtype(token_dtype(vocabulary_size))
        self._begin = [] if begin_token is None else [begin_token]
        self._encode: Callable[[list[str]], list[list[int]]]
        if (folder / "tokenizer.json").is_file():
            from tokenizers import Tokenizer  # without importing transformers, a worker starts in a tenth of the time

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

    def __call__(self, batch: EncodingTask) -> Result:
        """Encode texts."""
        texts, contents = batch.texts, [text.encode("utf-8") for text in batch.texts]
        held_out = batch.held_out.mask(contents)
        if batch.skip_held_out and held_out.any():
            keep = np.flatnonzero(~held_out).tolist()
            texts, contents = [texts[i] for i in keep], [contents[i] for i in keep]
            held_out = np.zeros(len(texts), dtype=bool)
        ids, lengths = [np.empty(0, dtype=self._dtype)], []
        for begin in range(0, len(texts), _AT_ONCE):
            stream: list[int] = []
            for document in self._ids(texts[begin : begin + _AT_ONCE]):
                stream += self._begin
                length = len(self._begin) + 1
                for part in document:
                    length += len(part)
                    stream += part
                    if len(stream) > long_texts.PIECE_CHARACTERS:  # a list takes ten times the memory of an array
                        ids.append(np.array(stream, dtype=self._dtype))
                        stream = []
                stream.append(self._end_token)
                lengths.append(length)
            ids.append(np.array(stream, dtype=self._dtype))
        counts = np.array(lengths, dtype=np.int64)
        return Result(Encoded(np.concatenate(ids), counts, _lengths(contents), _lengths(texts)), held_out, [])

    def _ids(self, texts: list[str]) -> Iterator[Iterable[list[int]]]:
        """The ids of each text; those of a very long one in several parts."""
        long = [len(text) > long_texts.PIECE_CHARACTERS for text in texts]
        short = iter(self._encode([text for text, is_long in zip(texts, long, strict=True) if not is_long]))
        for text, is_long in zip(texts, long, strict=True):
            if is_long:
                yield (self._encode([piece])[0] for piece in long_texts.pieces(text, self._encode))
            else:
                yield [next(short)]


def _lengths(items: list[Any]) -> np.ndarray:
    return np.fromiter(map(len, items), dtype=np.int64, count=len(items))


_encode: Callable[[EncodingTask], Result] | None = None  # one per worker process


def _start_worker(make: Callable[[], Callable[[EncodingTask], Result]]) -> None:
    global _encode
    os.putenv("TOKENIZERS_PARALLELISM", "false")  # there is one process per core; more threads would only compete
    _encode = make()


def _encode_in_worker(batch: EncodingTask) -> Result:
    assert _encode is not None
    return _encode(batch)


class Pool(Protocol):
    """A provider of encoded batches: worker processes, or the recorded parts of a divided build.

    Attributes:
        processes: determines how many batches are submitted ahead.
    """

    processes: int

    def submit(self, batch: EncodingTask) -> Any:
        """Submit a batch; pass the returned task to `result`."""

    def result(self, task: Any) -> Result:
        """Wait for a task's result."""


class EncodingPool:
    """Worker processes that encode batches; the caller collects results in the order of submission.

    Args:
        make: makes an encoder; must be picklable, such as `partial(Encoder, ...)`.
        processes: number of workers. With one, this process encodes itself (helped by the tokenizer's own threads).
    """

    def __init__(self, make: Callable[[], Callable[[EncodingTask], Result]], processes: int) -> None:
        self.processes = processes
        self._encode = self._pool = None
        if processes == 1:
            self._encode = make()
        else:  # spawned, not forked, because the tokenizer and pyarrow have threads
            self._pool = ProcessPoolExecutor(
                processes,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(make,),
            )
            for _ in range(processes):  # start them now, while the first texts are being read
                self._pool.submit(_encode_in_worker, EncodingTask([], HeldOut(0.0, 0)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, batch: EncodingTask) -> "Future[Result] | EncodingTask":
        """Submit texts to be encoded; pass the returned task to `result`."""
        if self._pool is None:
            return batch
        try:
            return self._pool.submit(_encode_in_worker, batch)
        except BrokenProcessPool as error:
            raise _worker_died(self.processes) from error

    def result(self, task: Any) -> Result:
        """Wait for a task's result.

        Raises:
            DataError: a worker process died.
        """
        if self._encode is not None:
            return self._encode(task)
        try:
            return task.result()
        except BrokenProcessPool as error:
            raise _worker_died(self.processes) from error


def _worker_died(processes: int) -> DataError:
    return DataError(
        f"one of {processes} encoding processes ended unexpectedly",
        "its documents would be missing",
        "look for an out-of-memory kill in the system's log and use fewer `processes`; if you build data from your own "
        'script, it needs `if __name__ == "__main__":`, because workers import it',
    )

"""Several sources as one stream of encoded documents, in the proportions of their weights."""

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from minima.data.documents import Document, Rejected, batched, shuffled, split
from minima.data.encoding import EncodingPool
from minima.data.sources import read_source
from minima.errors import DataError
from minima.recipe.data import Source

# A source takes its turn for so many tokens, or one document if that is longer; the mixture is right to that.
TURN_TOKENS = 1024


class Encoded(NamedTuple):
    """Whole documents of one source and one side of the split.

    Attributes:
        ids: all documents' ids, end tokens included.
        lengths: ids of each document.
        sizes: UTF-8 bytes of each document's text.
        characters: of each document's text.
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
        """The documents where the boolean array is true."""
        return Encoded(self.ids[np.repeat(documents, self.lengths)], *(column[documents] for column in self[1:]))


def training_documents(
    source: Source, held_out_fraction: float, seed: int, rejected: Rejected, passes: int = 0
) -> Iterator[Document]:
    """A source's documents in the seeded order of its n-th pass, held-out ones marked."""
    texts = shuffled(read_source(source, rejected), f"{seed}:{source.label}:{passes}")
    return split(texts, held_out_fraction, seed)


class SourceStream:
    """One source, encoded ahead by the pool, pass after pass.

    Attributes:
        rejected: of the first pass.
        passes: whole passes that are over.
        tokens, documents, bytes, characters: handed out for training so far, over all passes.
        held_out_documents: handed to `held_out` so far.
    """

    def __init__(self, source: Source, pool: EncodingPool, held_out_fraction: float, seed: int) -> None:
        self.source, self.weight = source, source.weight or 1.0
        self.rejected = Rejected()
        self.passes = self.tokens = self.documents = self.bytes = self.characters = self.held_out_documents = 0
        self._pool, self._fraction, self._seed = pool, held_out_fraction, seed
        self._pending: deque[tuple[list[Document], Any]] = deque()
        self._ready: Encoded | None = None
        self._first_pass_tokens = 0
        self._begin_pass()

    @property
    def epochs(self) -> float | None:
        """Passes over the training documents, the share of the last included; not known within the first pass."""
        return self.tokens / self._first_pass_tokens if self.passes else None

    def _begin_pass(self) -> None:
        rejected = Rejected() if self.passes else self.rejected
        documents = training_documents(self.source, self._fraction, self._seed, rejected, self.passes)
        if self.passes:
            documents = (document for document in documents if not document.held_out)
        self._batches = batched(documents)

    def _fill(self) -> None:
        while len(self._pending) < 2 * self._pool.processes + 2:
            batch = next(self._batches, None)
            if batch is None:
                return
            self._pending.append((batch, self._pool.submit([document.text for document in batch])))

    def next_batch(self) -> tuple[Encoded, Encoded] | None:
        """Training and held-out documents of the next batch; none at the end of a pass."""
        self._fill()
        if not self._pending:
            return None
        batch, task = self._pending.popleft()
        ids, lengths = self._pool.result(task)
        sizes = np.array([document.size for document in batch], dtype=np.int64)
        characters = np.array([len(document.text) for document in batch], dtype=np.int64)
        everything = Encoded(ids, lengths, sizes, characters)
        held_out = np.array([document.held_out for document in batch])
        self.held_out_documents += int(held_out.sum())
        if not held_out.any():
            return everything, everything.part(0, 0)
        return everything.select(~held_out), everything.select(held_out)

    def take(self, limit_tokens: int | None) -> Iterator[tuple[Encoded, Encoded]]:
        """Training documents of about `limit_tokens` (all of a batch when none), each with the held-out ones found.

        Ends early, and counts a pass, when the pass is over.
        """
        taken = 0
        while limit_tokens is None or taken < limit_tokens:
            if self._ready is None:
                batch = self.next_batch()
                if batch is None:
                    self._end_pass()
                    return
                self._ready, held_out = batch
            else:
                held_out = self._ready.part(0, 0)
            ready = self._ready
            count = len(ready.lengths)
            if limit_tokens is not None:
                count = min(count, int(np.searchsorted(np.cumsum(ready.lengths), limit_tokens - taken)) + 1)
            given = ready.part(0, count)
            self._ready = ready.part(count, len(ready.lengths)) if count < len(ready.lengths) else None
            taken += len(given.ids)
            self.tokens += len(given.ids)
            self.documents += len(given.lengths)
            self.bytes += int(given.sizes.sum())
            self.characters += int(given.characters.sum())
            yield given, held_out
            if limit_tokens is None:
                return

    def _end_pass(self) -> None:
        self.passes += 1
        if self.passes == 1:
            self._first_pass_tokens = self.tokens
        if not self.tokens:
            raise DataError(
                f"all {self.held_out_documents} documents of source {self.source.label!r} are held out",
                "nothing of it is left to train on",
                "lower `held_out_fraction`, or give the source more documents",
            )
        self._begin_pass()


def mix(streams: list[SourceStream], *, endless: bool) -> Iterator[tuple[Encoded, Encoded]]:
    """Documents of all sources: always the source that is furthest behind its weight comes next.

    Without any weight, no source begins another pass before every source has ended its own. With weights, a source
    that runs out begins again at once, so that the proportions hold.

    Args:
        streams: the sources.
        endless: go on until the caller stops; else until each source has been read once (with weights, until the
            one that takes longest has been).
    """
    weighted = any(stream.source.weight is not None for stream in streams)
    active = list(streams)
    while active:
        stream = min(active, key=lambda stream: stream.tokens / stream.weight)
        passes = stream.passes
        yield from stream.take(None if len(active) == 1 else TURN_TOKENS)
        if stream.passes == passes:
            continue
        if not weighted:
            active.remove(stream)
            if not active and endless:
                active = list(streams)
        elif not endless and all(stream.passes for stream in streams):
            return

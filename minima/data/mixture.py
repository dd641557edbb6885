"""Several sources as one stream of encoded documents, in the proportions of their weights."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from minima.data.documents import HeldOut, Rejected, batched, shuffled
from minima.data.encoding import Encoded, EncodingTask, Pool
from minima.data.sources import no_document, read_source
from minima.errors import DataError
from minima.recipe.data import Source

# A source's turn lasts this many tokens, or one document if that is longer; proportions are exact up to one turn.
TURN_TOKENS = 1024

# Reads a source's texts, or packed conversations or pairs, or the placeholders for recorded ones.
Reader = Callable[[Source, Rejected], Iterator[Any]]


def read_shuffled(
    source: Source, number: int, seed: int, rejected: Rejected, passes: int = 0, read: Reader = read_source
) -> Iterator[Any]:
    """The documents of the stage's `number`-th source in the seeded order of a pass."""
    return shuffled(read(source, rejected), f"{seed}:{number}:{passes}")


def training_texts(
    sources: list[tuple[int, Source]], held_out: HeldOut, max_characters: int, rejected: Rejected | None = None
) -> Iterator[str]:
    """Documents that are not held out, in proportion to the sources' weights, up to a limit.

    Args:
        sources: each with its index among the stage's sources.
        held_out: the rule for held-out documents; its seed also determines the order.
        max_characters: the limit; the last document is cut there.
    """
    rejected = rejected or Rejected()
    readers = [read_shuffled(source, number, held_out.seed, rejected) for number, source in sources]
    taken = [0.0] * len(readers)
    active, left = list(range(len(readers))), max_characters
    while active and left > 0:
        turn = min(active, key=lambda i: taken[i])
        text = next(readers[turn], None)
        if text is None:
            active.remove(turn)
        elif not held_out.mask([text.encode("utf-8")])[0]:
            text = text[:left]
            left -= len(text)
            taken[turn] += len(text) / (sources[turn][1].weight or 1.0)
            yield text


def source_labels(sources: list[Source]) -> list[str]:
    """The sources' labels, with a number appended to equal ones."""
    labels = [source.label for source in sources]
    return [
        label if labels.count(label) == 1 else f"{label}#{labels[:i].count(label) + 1}"
        for i, label in enumerate(labels)
    ]


class _Batch(NamedTuple):
    """Documents of one source in order, with training documents separated from the held-out ones between them."""

    training: Encoded  # documents to train on
    held_out: Encoded  # the others
    before: np.ndarray  # int array; for each held-out document, the number of the batch's training documents before it

    def split(self, count: int) -> tuple["_Batch", "_Batch | None"]:
        """The first `count` training documents with the held-out ones before the last of them, and the rest."""
        if count == len(self.training.lengths):
            return self, None
        aside = int(np.searchsorted(self.before, count))
        first = _Batch(self.training.part(0, count), self.held_out.part(0, aside), self.before[:aside])
        left = self.training.part(count, len(self.training.lengths))
        return first, _Batch(left, self.held_out.part(aside, len(self.before)), self.before[aside:] - count)


class SourceStream:
    """One source, encoded ahead by the pool, pass after pass; `number` is its index among the stage's sources.

    Attributes:
        rejected: of the first pass.
        passes: number of completed passes.
        tokens, learnt_tokens, documents, bytes, characters: returned for training so far, over all passes.
        held_out_documents: documents returned as held out that were kept; whoever writes them counts them.
        cut: number of conversations that were too long and lost turns at their end, in the first pass.
        unanswered: number of unanswered turns at the end of conversations that were left out, in the first pass.
    """

    def __init__(self, source: Source, number: int, pool: Pool, held_out: HeldOut, read: Reader = read_source) -> None:
        self.source, self.weight, self._read = source, source.weight or 1.0, read
        self.rejected = Rejected()
        self.passes = self.tokens = self.learnt_tokens = self.documents = self.bytes = self.characters = 0
        self.held_out_documents = self.cut = self.unanswered = self._set_aside = 0
        self._number, self._pool, self._held_out = number, pool, held_out
        self._pending: deque[Any] = deque()
        self._ready: _Batch | None = None
        self._first_pass_tokens = 0
        self._begin_pass()

    @property
    def epochs(self) -> float | None:
        """Passes over the training documents, the last one in part; None during the first pass."""
        return self.tokens / self._first_pass_tokens if self.passes else None

    def _begin_pass(self) -> None:
        rejected = Rejected() if self.passes else self.rejected
        self._batches = batched(
            read_shuffled(self.source, self._number, self._held_out.seed, rejected, self.passes, self._read)
        )

    def _fill(self) -> None:
        while len(self._pending) < 2 * self._pool.processes + 2:
            texts = next(self._batches, None)
            if texts is None:
                return
            self._pending.append(self._pool.submit(EncodingTask(texts, self._held_out, skip_held_out=self.passes > 0)))

    def _next_batch(self) -> _Batch | None:
        """Training and held-out documents of the next batch; None at the end of a pass."""
        self._fill()
        if not self._pending:
            return None
        everything, held_out, rejected = self._pool.result(self._pending.popleft())
        if not self.passes:
            for record in rejected:
                self.rejected.add(*record)
            self.cut += 0 if everything.cut is None else int((everything.cut > 0).sum())
            self.unanswered += 0 if everything.unanswered is None else int(everything.unanswered.sum())
        if not held_out.any():
            return _Batch(everything, everything.part(0, 0), np.empty(0, dtype=np.int64))
        before = np.cumsum(~held_out)[held_out]
        return _Batch(everything.select(~held_out), everything.select(held_out), before)

    def take(self, limit_tokens: int | None) -> Iterator[tuple[Encoded, Encoded]]:
        """Training documents of about `limit_tokens` (one batch if None), and the held-out ones between them.

        Held-out documents keep their place in the source's order, so they are mixed across sources in the same way as
        training documents, and a source of which little is read contributes few of them. At the end of a pass it stops
        early and counts the pass.
        """
        taken = 0
        while limit_tokens is None or taken < limit_tokens:
            ready = self._ready or self._next_batch()
            if ready is None:
                self._end_pass()
                return
            count = len(ready.training.lengths)
            if limit_tokens is not None:
                ends = np.cumsum(ready.training.lengths)
                count = min(count, int(np.searchsorted(ends, limit_tokens - taken)) + 1)
            (given, held_out, _), self._ready = ready.split(count)
            taken += len(given.ids)
            self.tokens += len(given.ids)
            self.learnt_tokens += len(given.ids) if given.learnt is None else int(given.learnt.sum())
            self.documents += len(given.lengths)
            self.bytes += int(given.sizes.sum())
            self.characters += int(given.characters.sum())
            self._set_aside += len(held_out.lengths)
            yield given, held_out
            if limit_tokens is None:
                return

    def _end_pass(self) -> None:
        self.passes += 1
        if self.passes == 1:
            self._first_pass_tokens = self.tokens
        if not self.tokens and not self._set_aside:
            raise no_document(self.source, self.rejected, "that its documents fit into a block")
        if not self.tokens:
            raise DataError(
                f"all {self._set_aside} documents of source {self.source.label!r} are held out",
                "none of it is left to train on",
                "lower `held_out_fraction`, or give the source more documents (a plain text file is one document)",
            )
        self._begin_pass()


def mix(streams: list[SourceStream], *, endless: bool) -> Iterator[tuple[SourceStream, Encoded, Encoded]]:
    """Interleave the documents of all sources; the source that is furthest behind its weight comes next.

    If no source has a weight, none starts another pass before all have finished theirs. With weights, a source that
    runs out starts again at once, so that the proportions hold.

    Args:
        endless: continue until the caller stops; else until each source has been read once (with weights, until the
            slowest one has been).

    Yields:
        A source, some of its training documents, and the held-out ones between them.
    """
    weighted = any(stream.source.weight is not None for stream in streams)
    active = list(streams)
    while active:
        stream = min(active, key=lambda stream: stream.tokens / stream.weight)
        passes = stream.passes
        for documents, held_out in stream.take(None if len(active) == 1 else TURN_TOKENS):
            yield stream, documents, held_out
        if stream.passes == passes:
            continue
        if not weighted:
            active.remove(stream)
            if not active and endless:
                active = list(streams)
        elif not endless and all(stream.passes for stream in streams):
            return

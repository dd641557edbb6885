"""Packing of conversations and preference pairs into blocks: each stays whole, and blocks are padded."""

from bisect import bisect_left, insort
from pathlib import Path
from typing import Any, Self

import numpy as np

from minima.data.encoding import Encoded
from minima.data.packing import StoreWriter

# Units are buffered up to this many blocks before they are packed. With a thousand blocks best fit has so much choice
# that a larger window packs no better; with 4,096 tokens per block they take 20 MB.
WINDOW_BLOCKS = 1024


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Pack by best fit decreasing: the longest first, each into the fullest block that has room for it.

    Args:
        lengths: int array [n], none above `capacity`.

    Returns:
        int64 array [n]: the block number of each item, counted from 0.
    """
    chosen = np.empty(len(lengths), dtype=np.int64)
    rooms: list[tuple[int, int]] = []  # free space and number of each block that is not full; sorted
    blocks = 0
    sizes = lengths.tolist()
    for unit in np.argsort(-lengths, kind="stable").tolist():
        at = bisect_left(rooms, (sizes[unit], -1))
        if at < len(rooms):
            room, block = rooms.pop(at)
        else:
            room, block = capacity, blocks
            blocks += 1
        if room > sizes[unit]:
            insort(rooms, (room - sizes[unit], block))
        chosen[unit] = block
    return chosen


class PackedWriter:
    """Writes a store whose units are never split; has the interface of `StoreWriter`, which does the writing.

    Blocks are packed window by window, so the result depends only on the units and their order. With `max_blocks`, the
    last window takes units in order as long as they fit.

    Args:
        settings: as for `StoreWriter`.

    Attributes:
        padding_tokens: number of padding tokens.
        beyond_tokens: number of tokens in units for which `max_blocks` left no room.
    """

    def __init__(self, folder: Path, *, max_blocks: int | None = None, **settings: Any) -> None:
        self._store = StoreWriter(folder, **settings)
        self._length: int = settings["sequence_length"]
        self._end_token: int = settings["end_token"]
        self._left = max_blocks  # number of blocks still to write
        self._window: list[Encoded] = []
        self._waiting = 0  # tokens in the window
        self._units = 0
        self.padding_tokens = self.beyond_tokens = 0

    def __enter__(self) -> Self:
        self._store.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._store.__exit__(*failure)

    @property
    def tokens(self) -> int:
        """Number of tokens taken so far."""
        return self._store.tokens + self._waiting

    @property
    def full(self) -> bool:
        """Whether `max_blocks` blocks are written, or have no room for another unit."""
        return self._left == 0

    def add(self, units: Encoded) -> int:
        """Add conversations or pairs, none longer than a block.

        Returns:
            How many were taken; the last ones may still be left out if the store gets full.
        """
        if self.full:
            self.beyond_tokens += len(units.ids)
            return 0
        self._window.append(units)
        self._waiting += len(units.ids)
        blocks = WINDOW_BLOCKS if self._left is None else min(WINDOW_BLOCKS, self._left)
        if self._waiting >= blocks * self._length:
            self._flush()
        return len(units.lengths)

    def _flush(self) -> None:
        """Pack and write the window."""
        units = Encoded.joined(self._window)
        self._window, self._waiting = [], 0
        if not len(units.lengths):
            return
        blocks_of = best_fit(units.lengths, self._length)
        if self._left is not None:
            if blocks_of.max() >= self._left:
                units, blocks_of = self._first_that_fit(units, self._left)
                self._left = 0
            else:
                self._left -= int(blocks_of.max()) + 1
        self._write(units, blocks_of)

    def _first_that_fit(self, units: Encoded, blocks: int) -> tuple[Encoded, np.ndarray]:
        """As many of the first units as fit into this many blocks, and the block number of each."""
        low, high = 1, len(units.lengths)  # `low` units fit, `high` do not
        while high - low > 1:
            middle = (low + high) // 2
            fits = best_fit(units.lengths[:middle], self._length).max() < blocks
            low, high = (middle, high) if fits else (low, middle)
        taken = units.part(0, low)
        self.beyond_tokens += len(units.ids) - len(taken.ids)
        return taken, best_fit(taken.lengths, self._length)

    def _write(self, units: Encoded, blocks_of: np.ndarray) -> None:
        assert units.learnt is not None and units.firsts is not None
        self._units += len(units.lengths)
        ends = np.cumsum(units.lengths)
        room = self._length - np.bincount(blocks_of, weights=units.lengths).astype(np.int64)
        self.padding_tokens += int(room.sum())
        filling = np.full(self._length, self._end_token, dtype=units.ids.dtype)
        unlearnt = np.zeros(self._length, dtype=np.uint8)
        ids, learnt = [], []
        documents: list[tuple[int, int, bool]] = []  # length, bytes, whether it is padding
        order = np.argsort(blocks_of, kind="stable")
        last_of_block = np.append(blocks_of[order][1:] != blocks_of[order][:-1], True)
        for unit, last in zip(order.tolist(), last_of_block.tolist(), strict=True):
            length, first, size = (int(column[unit]) for column in (units.lengths, units.firsts, units.sizes))
            span = slice(int(ends[unit]) - length, int(ends[unit]))
            ids.append(units.ids[span])
            learnt.append(units.learnt[span])
            documents.append((first, size, False))
            if first < length:
                documents.append((length - first, 0, False))  # bytes count once: both answers are in the same block
            if last and (left := int(room[blocks_of[unit]])):
                ids.append(filling[:left])
                learnt.append(unlearnt[:left])
                documents.append((left, 0, True))
        lengths, sizes, fills = zip(*documents, strict=True)
        self._store.append(
            np.concatenate(ids), np.array(lengths), np.array(sizes), np.concatenate(learnt), np.array(fills, dtype=bool)
        )

    def finish(self) -> dict[str, Any]:
        """Write the rest and close the store; see `StoreWriter.finish`. Adds `units` and `padding_tokens`."""
        self._flush()
        return self._store.finish() | {"units": self._units, "padding_tokens": self.padding_tokens}

    def publish(self) -> None:
        """Move the finished store to its final name, replacing an older one."""
        self._store.publish()

"""Which block is the n-th training sample: a permutation of the blocks per epoch that is computed, never stored."""

import numpy as np

# Rounds of the Feistel network. With ideal round functions, four make it indistinguishable from random (Luby and
# Rackoff, 1988); the rest is a margin for the small halves (2 bits) of a small store.
_ROUNDS = 8


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): every input bit reaches every output bit."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class BlockSampler:
    """Maps a global sample index to a block: every block exactly once per epoch, in a different order each epoch.

    The order depends only on `num_blocks` and `seed`, and any part of it can be computed directly. So a run can resume
    at any sample, on any number of ranks, with no state but the index, and memory does not grow with the store. The
    permutation is a Feistel network over the next power of four, applied repeatedly until it lands on a block (Black
    and Rogaway, 2002: "cycle walking"), which takes fewer than four steps on average.
    """

    def __init__(self, num_blocks: int, seed: int) -> None:
        assert num_blocks > 0, num_blocks
        self.num_blocks = num_blocks
        self.seed = seed
        self._half_bits = max(1, ((num_blocks - 1).bit_length() + 1) // 2)

    def indices(self, start: int, stop: int) -> np.ndarray:
        """The blocks of samples `start` to `stop - 1`.

        Args:
            start: first global sample index; the epoch is `index // num_blocks`.

        Returns:
            int64 array [stop - start].
        """
        assert 0 <= start <= stop, (start, stop)
        samples = np.arange(start, stop, dtype=np.uint64)
        epochs, positions = samples // np.uint64(self.num_blocks), samples % np.uint64(self.num_blocks)
        seed = _mix(np.asarray([self.seed % 2**64], dtype=np.uint64))
        keys = _mix(epochs ^ seed)
        blocks = self._permute(positions, keys)
        outside = np.flatnonzero(blocks >= self.num_blocks)
        while outside.size:
            blocks[outside] = self._permute(blocks[outside], keys[outside])
            outside = outside[blocks[outside] >= self.num_blocks]
        return blocks.astype(np.int64)

    def _permute(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        bits, mask = np.uint64(self._half_bits), np.uint64((1 << self._half_bits) - 1)
        left, right = values >> bits, values & mask
        for round_number in range(_ROUNDS):
            left, right = right, left ^ (_mix(right ^ _mix(keys + np.uint64(round_number))) & mask)
        return (left << bits) | right

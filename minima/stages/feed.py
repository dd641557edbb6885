"""Which blocks each rank trains on at each step: a function of the step alone, so resuming reads no earlier ones."""

import numpy as np
import torch

from minima.batch import Batch
from minima.data.batches import read_batch
from minima.data.sampler import BlockSampler
from minima.data.store import TokenStore


class Feed:
    """Provides the micro-batches of each step on one rank.

    Global sample `i` is a sampled block. Step `s` consists of samples `s * batch` to `(s + 1) * batch - 1`; each rank
    takes a contiguous part of them. Samples from `total_sequences` on are fully masked, so that all ranks do the same
    work in the last step.

    Args:
        store: training blocks.
        seed: of the blocks' order.
        batch_sequences: sequences of one step over all ranks.
        micro_batch_sequences: sequences of one micro-batch.
        total_sequences: sequences of the whole stage.
        rank: of this process.
        world_size: number of ranks; `world_size * micro_batch_sequences` divides `batch_sequences`.
        device: where the batches go.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        seed: int,
        batch_sequences: int,
        micro_batch_sequences: int,
        total_sequences: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.store = store
        self.sampler = BlockSampler(len(store), seed)
        self.batch_sequences, self.micro_batch_sequences = batch_sequences, micro_batch_sequences
        self.total_sequences = total_sequences
        self.rank, self.share = rank, batch_sequences // world_size
        self.device = device

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of step `step`, counted from 0."""
        first = step * self.batch_sequences + self.rank * self.share
        samples = np.arange(first, first + self.share)
        blocks = self.sampler.indices(first, first + self.share)
        batches = []
        for start in range(0, self.share, self.micro_batch_sequences):
            rows = slice(start, start + self.micro_batch_sequences)
            valid, numbers = samples[rows] < self.total_sequences, tuple(samples[rows].tolist())
            batch = read_batch(self.store, blocks[rows], valid, samples=numbers)
            batches.append((batch.pin_memory() if self.device.type == "cuda" else batch).to(self.device))
        return batches

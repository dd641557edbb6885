"""Which blocks each rank trains on at each step: a function of the step alone, so a resumed run replays nothing."""

import numpy as np
import torch

from minima.batch import Batch, make_batch
from minima.data.sampler import BlockSampler
from minima.data.store import TokenStore


class Feed:
    """A step's micro-batches on one rank.

    Global sample `i` is a sampled block. Step `s` holds samples `s * batch` to `(s + 1) * batch - 1`; each rank takes
    a contiguous part of them. Samples from `total_sequences` on are fully masked, so that no rank does less in the
    last step.

    Args:
        store: training blocks.
        seed: of the blocks' order.
        batch_sequences: sequences of one step over all ranks.
        micro_batch_sequences: sequences of one micro-batch.
        total_sequences: sequences of the whole stage.
        rank: of this process.
        world_size: ranks; `batch_sequences` divides by `world_size * micro_batch_sequences`.
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
        """This rank's micro-batches of step `step`, the first being 0."""
        first = step * self.batch_sequences + self.rank * self.share
        samples = np.arange(first, first + self.share)
        tokens_ST = torch.from_numpy(self.store.blocks(self.sampler.indices(first, first + self.share)))
        valid_S1 = torch.from_numpy(samples < self.total_sequences).unsqueeze(1)
        batches = []
        for start in range(0, self.share, self.micro_batch_sequences):
            rows = slice(start, start + self.micro_batch_sequences)
            tokens_BT = tokens_ST[rows]
            batch = make_batch(tokens_BT, valid_S1[rows].expand_as(tokens_BT))
            if self.device.type == "cuda":
                batch = Batch(batch.input_ids_BT.pin_memory(), batch.labels_BT.pin_memory())
            batches.append(batch.to(self.device))
        return batches

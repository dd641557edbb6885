"""Every sample exactly once, whatever the ranks and micro-batches; a last step that is filled up."""

import numpy as np
import pytest
import torch

from minima.batch import IGNORE_INDEX
from minima.stages.feed import Feed
from tests.fakes import TextStore


class Store(TextStore):
    """Blocks whose tokens are their own number."""

    sequence_length = 4

    def __init__(self, blocks: int) -> None:
        self.num = blocks

    def __len__(self) -> int:
        return self.num

    def blocks(self, indices: np.ndarray) -> np.ndarray:
        return np.repeat(np.asarray(indices)[:, None], self.sequence_length, axis=1)


def feed(rank=0, world_size=1, micro=2, total=44, seed=5) -> Feed:
    return Feed(
        Store(22), seed=seed, batch_sequences=12, micro_batch_sequences=micro, total_sequences=total, rank=rank,
        world_size=world_size, device=torch.device("cpu"),
    )  # fmt: skip


def trained(batches) -> list[int]:
    return [int(row[0]) for batch in batches for row in batch.labels_BT if row[0] != IGNORE_INDEX]


@pytest.mark.parametrize(("world_size", "micro"), [(1, 12), (2, 3), (3, 2), (6, 1)])
def test_ranks_and_micro_batches_do_not_change_a_step(world_size, micro):
    for step in range(4):
        whole = trained(feed(micro=12).step(step))
        shares = [trained(feed(rank, world_size, micro).step(step)) for rank in range(world_size)]
        assert [row for share in shares for row in share] == whole


def test_two_epochs_see_each_block_twice_and_the_last_step_is_filled_with_masked_rows():
    seen = [row for step in range(4) for row in trained(feed().step(step))]
    assert np.bincount(seen, minlength=22).tolist() == [2] * 22
    last = [feed(rank, 2).step(3) for rank in range(2)]
    assert [len(batches) for batches in last] == [3, 3], "no rank does less"
    assert sum(len(trained(batches)) for batches in last) == 44 - 3 * 12


def test_the_seed_sets_the_order():
    orders = [trained(feed(seed=seed).step(0)) for seed in (5, 5, 6)]
    assert orders[0] == orders[1] != orders[2]


def test_ranks_that_change_in_mid_epoch_see_each_sample_once():
    places = [(0, 2, 3), (1, 1, 12), (2, 3, 2), (3, 6, 1)]  # step, ranks from then on, micro-batch
    seen = []
    for step, ranks, micro in places:
        for rank in range(ranks):
            for batch in feed(rank, ranks, micro).step(step):
                seen += [sample for sample, row in zip(batch.samples, batch.labels_BT, strict=True) if row[0] >= 0]
    assert sorted(seen) == list(range(44))

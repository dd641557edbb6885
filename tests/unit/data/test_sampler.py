"""Every block once per epoch, from any index, without state."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minima.data.sampler import BlockSampler


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 50))
def test_each_epoch_is_a_permutation(num_blocks, seed, epoch):
    indices = BlockSampler(num_blocks, seed).indices(epoch * num_blocks, (epoch + 1) * num_blocks)
    assert indices.dtype == np.int64
    assert np.array_equal(np.sort(indices), np.arange(num_blocks))


@given(st.integers(1, 500), st.integers(0, 2000), st.integers(0, 2000))
def test_any_part_is_a_part_of_the_whole(num_blocks, first, second):
    sampler, (start, stop) = BlockSampler(num_blocks, 776), sorted((first, second))
    assert np.array_equal(sampler.indices(start, stop), sampler.indices(0, 2000)[start:stop])


def test_epochs_and_seeds_differ():
    orders = [BlockSampler(1000, 1).indices(0, 1000), BlockSampler(1000, 1).indices(1000, 2000)]
    orders += [BlockSampler(1000, 2).indices(0, 1000), np.arange(1000)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 20  # one in expectation


@pytest.mark.parametrize("num_blocks", [5, 64, 100])
def test_every_block_is_as_likely_everywhere(num_blocks):
    epochs = 4000
    orders = BlockSampler(num_blocks, 776).indices(0, epochs * num_blocks).reshape(epochs, num_blocks)
    counts = np.zeros((num_blocks, num_blocks))
    for position in range(num_blocks):
        counts[position] = np.bincount(orders[:, position], minlength=num_blocks)
    expected = epochs / num_blocks
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    freedom = (num_blocks - 1) ** 2
    assert abs(chi_squared - freedom) < 6 * np.sqrt(2 * freedom)  # mean and deviation of chi squared


def test_the_order_never_changes():
    """A resumed run relies on it across versions."""
    assert BlockSampler(10, 776).indices(0, 20).tolist() == [
        9, 2, 4, 3, 0, 8, 7, 1, 6, 5, 8, 3, 4, 1, 2, 6, 7, 9, 0, 5,
    ]  # fmt: skip
    assert BlockSampler(16, 2**40).indices(0, 16).tolist() == [
        13, 5, 15, 1, 2, 4, 6, 14, 8, 0, 3, 7, 12, 10, 9, 11,
    ]  # fmt: skip

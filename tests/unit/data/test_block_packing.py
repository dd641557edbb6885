"""Units are whole, each once, in the order-free way of best fit; what is left is filled up and counted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minima.batch import IGNORE_INDEX
from minima.data import block_packing
from minima.data.batches import read_batch
from minima.data.block_packing import PackedWriter, best_fit
from minima.data.encoding import Encoded
from minima.data.store import TokenStore

END, LENGTH = 2, 16


def units_of(spec, first_id=3):
    """Encoded units; each is (length of the first document, length of the second or 0). Ids tell the unit."""
    ids, learnt, firsts = [], [], []
    for number, (one, two) in enumerate(spec):
        ids += [first_id + number] * (one + two)
        learnt += [(place + number) % 3 == 0 for place in range(one + two)]
        firsts.append(one)
    lengths = np.array([one + two for one, two in spec], dtype=np.int64)
    return Encoded(
        np.array(ids, dtype=np.uint16), lengths, 5 * lengths, 4 * lengths, np.array(learnt, dtype=np.uint8),
        np.array(firsts, dtype=np.int64), np.zeros(len(spec), dtype=np.int64),
    )  # fmt: skip


def write(folder, pieces, *, max_blocks=None, shard_tokens=48, format="conversations", mask=True):
    with PackedWriter(
        folder, sequence_length=LENGTH, vocabulary_size=1000, end_token=END, shard_tokens=shard_tokens,
        max_blocks=max_blocks, format=format, document_mask=mask,
    ) as writer:  # fmt: skip
        for piece in pieces:
            writer.add(piece)
        finished = writer.finish()
        writer.publish()
    return finished, writer


def contents(store):
    """Documents of all blocks: block, ids and what of them is learnt."""
    found = []
    everything = np.arange(len(store))
    for block, (ids, learnt, numbers) in enumerate(
        zip(store.blocks(everything), store.learnt(everything), store.documents(everything), strict=True)
    ):
        for number in range(numbers.max() + 1):
            mine = numbers == number
            found.append((block, ids[mine].tolist(), learnt[mine].astype(int).tolist()))
    return found


conversation = st.tuples(st.integers(1, LENGTH), st.just(0))
pair = st.tuples(st.integers(1, LENGTH // 2), st.integers(1, LENGTH // 2))


@settings(max_examples=80, deadline=None)
@given(
    spec=st.lists(conversation, max_size=60) | st.lists(pair, max_size=40),
    at_once=st.integers(1, 20),
    window=st.integers(1, 8),
)
def test_every_unit_is_whole_and_there_once(tmp_path_factory, spec, at_once, window):
    folder = tmp_path_factory.mktemp("store") / "train"
    pairs = any(two for _, two in spec)
    units = units_of(spec)
    pieces = [units.part(begin, min(len(spec), begin + at_once)) for begin in range(0, len(spec), at_once)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_packing, "WINDOW_BLOCKS", window)
        finished, _ = write(folder, pieces, format="preferences" if pairs else "conversations")
    store = TokenStore.open(folder)
    store.verify()
    documents = contents(store)
    kept = [(block, ids, learnt) for block, ids, learnt in documents if ids[0] != END]
    padding = [(ids, learnt) for _, ids, learnt in documents if ids[0] == END]
    expected = []
    for number, (one, two) in enumerate(spec):
        marks = [int((place + number) % 3 == 0) for place in range(one + two)]
        expected.append(([3 + number] * one, marks[:one]))
        if two:
            expected.append(([3 + number] * two, marks[one:]))
    assert sorted((ids, learnt) for _, ids, learnt in kept) == sorted(expected)
    if pairs:  # both in one block, the first in front, at an even place
        assert [kept[n][0] for n in range(0, len(kept), 2)] == [kept[n + 1][0] for n in range(0, len(kept), 2)]
        order = [ids[0] for _, ids, _ in kept]
        assert order[::2] == order[1::2]
        assert all(len(kept[n][1]) == spec[kept[n][1][0] - 3][0] for n in range(0, len(kept), 2))
    assert all(set(ids) == {END} and not any(learnt) for ids, learnt in padding)
    assert finished["documents"] == store.num_documents == len(expected)
    assert finished["units"] == len(spec)
    assert finished["padding_tokens"] == sum(len(ids) for ids, _ in padding)
    assert finished["tokens"] == len(units.ids) + finished["padding_tokens"] == len(store) * LENGTH
    assert finished["learnt_tokens"] == store.learnt_tokens == int(units.learnt.sum())
    assert store.bytes == 5 * len(units.ids)
    assert store.longest == max((size for unit in spec for size in unit), default=0), "filling is no document"


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=80))
def test_best_fit_fits_and_no_two_blocks_could_be_one(lengths):
    lengths = np.array(lengths)
    blocks = best_fit(lengths, 50)
    fill = np.bincount(blocks, weights=lengths)
    assert fill.max() <= 50
    assert fill.min() > 0
    assert len(fill) < 2 or np.sort(fill)[:2].sum() > 50


def test_best_fit_leaves_nothing_where_everything_fits():
    lengths = np.array([4, 9, 6, 7, 3, 1])
    assert np.bincount(best_fit(lengths, 10), weights=lengths).tolist() == [10, 10, 10]


@pytest.mark.parametrize("max_blocks", [1, 3, 7])
@pytest.mark.parametrize("at_once", [1, 50])
def test_a_budget_takes_units_in_their_order_until_it_is_full(tmp_path, max_blocks, at_once):
    rng = np.random.default_rng(0)
    spec = [(int(size), 0) for size in rng.integers(1, LENGTH, 200)]
    units = units_of(spec)
    pieces = [units.part(begin, begin + at_once) for begin in range(0, len(spec), at_once)]
    finished, writer = write(tmp_path / "train", pieces, max_blocks=max_blocks)
    assert finished["blocks"] == max_blocks
    assert writer.full
    kept = sorted(ids[0] - 3 for _, ids, _ in contents(TokenStore.open(tmp_path / "train")) if ids[0] != END)
    assert kept == list(range(len(kept)))  # the first ones, and all of them
    assert writer.beyond_tokens == sum(one for one, _ in spec[len(kept) :])
    assert finished["padding_tokens"] < LENGTH * max_blocks * 0.5


def test_units_of_a_block_keep_their_order(tmp_path):
    rng = np.random.default_rng(0)
    write(tmp_path / "train", [units_of([(int(size), 0) for size in rng.integers(1, 4, 900)])])
    kept = [(block, ids[0]) for block, ids, _ in contents(TokenStore.open(tmp_path / "train")) if ids[0] != END]
    assert len(kept) == 900 and kept == sorted(kept)


def test_padding_is_little(tmp_path):
    rng = np.random.default_rng(0)
    spec = [(int(size), 0) for size in rng.integers(1, LENGTH // 2, 3000)]
    finished, _ = write(tmp_path / "train", [units_of(spec[:900]), units_of(spec[900:1800]), units_of(spec[1800:2700])])
    assert finished["padding_tokens"] / finished["tokens"] < 0.005


def test_what_fills_a_block_is_no_document_and_no_position_is_beyond_the_longest_one(tmp_path):
    write(tmp_path / "train", [units_of([(3, 0), (2, 0)])])
    store = TokenStore.open(tmp_path / "train")
    assert store.longest == 3 and store.num_documents == 2
    write(tmp_path / "unmasked", [units_of([(3, 0), (2, 0)])], mask=False)
    assert TokenStore.open(tmp_path / "unmasked").longest == LENGTH, "attention and positions cross documents"
    batch = read_batch(store, np.array([0]))
    assert batch.documents_BT.max() == 2, "the rest of the block is one more document"
    assert batch.positions_BT.max() == 2 < LENGTH - 5


def test_the_beginning_of_a_block_is_that_of_the_whole_block(tmp_path):
    write(tmp_path / "train", [units_of([(3, 0), (7, 0), (2, 0), (9, 0)])])
    store, blocks = TokenStore.open(tmp_path / "train"), np.arange(2)
    whole, begun = read_batch(store, blocks), read_batch(store, blocks, sequence_length=8)
    assert whole.documents_BT[:, 7].any() and not whole.documents_BT[:, :8].equal(whole.documents_BT[:, -8:])
    for name in ("input_ids_BT", "documents_BT", "positions_BT"):
        assert getattr(begun, name).equal(getattr(whole, name)[:, :8]), name
    assert begun.labels_BT[:, :-1].equal(whole.labels_BT[:, :7]) and (begun.labels_BT[:, -1] == IGNORE_INDEX).all()

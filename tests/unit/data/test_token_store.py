"""Round trips, borders, damage."""

import errno
import json
import mmap
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minima import disk
from minima.data.packing import HashedFile, StoreWriter
from minima.data.store import TokenStore
from minima.errors import DataError, DiskFull, StoreCorrupted

END = 2


def write(folder, documents, *, sequence_length=8, vocabulary_size=100, shard_tokens=64, max_blocks=None, at_once=3):
    """Documents (lists of ids without their end) into a store; what finish() says."""
    closed = [[*document, END] for document in documents]
    with StoreWriter(
        folder, sequence_length=sequence_length, vocabulary_size=vocabulary_size, end_token=END,
        shard_tokens=shard_tokens, max_blocks=max_blocks,
    ) as writer:  # fmt: skip
        for begin in range(0, len(closed), at_once):
            some = closed[begin : begin + at_once]
            lengths = np.array([len(document) for document in some])
            writer.append(np.concatenate(some), lengths, 5 * lengths)
        finished = writer.finish()
        writer.publish()
    return finished


@pytest.fixture
def store(tmp_path):
    rng = np.random.default_rng(0)
    write(tmp_path / "store", [rng.integers(3, 100, size).tolist() for size in rng.integers(0, 30, 60)])
    return TokenStore.open(tmp_path / "store")


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(3, 69_999), max_size=40), max_size=25),
    sequence_length=st.integers(1, 17),
    wide=st.booleans(),
    shard_blocks=st.integers(0, 5),
    max_blocks=st.none() | st.integers(1, 20),
    at_once=st.integers(1, 6),
)
def test_round_trip(tmp_path_factory, documents, sequence_length, wide, shard_blocks, max_blocks, at_once):
    vocabulary_size = 70_000 if wide else 65_536
    documents = [[min(token, vocabulary_size - 1) for token in document] for document in documents]
    folder = tmp_path_factory.mktemp("store") / "train"
    finished = write(
        folder, documents, sequence_length=sequence_length, vocabulary_size=vocabulary_size,
        shard_tokens=shard_blocks * sequence_length + sequence_length // 2, max_blocks=max_blocks, at_once=at_once,
    )  # fmt: skip
    stream = [token for document in documents for token in [*document, END]]
    blocks = len(stream) // sequence_length
    if max_blocks is not None:
        blocks = min(blocks, max_blocks)
    kept = blocks * sequence_length
    store = TokenStore.open(folder)
    store.verify()
    assert len(store) == finished["blocks"] == blocks
    read = store.blocks(np.arange(blocks))
    assert read.dtype == np.int64
    assert read.shape == (blocks, sequence_length)
    assert read.reshape(-1).tolist() == stream[:kept]
    backwards = np.arange(blocks)[::-1]
    assert np.array_equal(store.blocks(backwards), read[::-1])
    starts = np.cumsum([0, *(len(document) + 1 for document in documents)])[:-1]
    assert store.document_starts().tolist() == [start for start in starts if start < kept]
    assert store.num_documents == sum(start < kept for start in starts)
    assert store.bytes == 5 * kept  # five bytes a token were claimed
    size = sum(file.stat().st_size for file in folder.glob("tokens-*.bin"))
    assert size == kept * (4 if wide else 2)


def test_document_starts_of_some_blocks(store):
    everything = store.document_starts()
    for first in range(len(store)):
        for last in (first, first + 1, min(len(store), first + 11)):
            inside = (everything >= first * 8) & (everything < last * 8)
            assert np.array_equal(store.document_starts(first, last), everything[inside])


def test_blocks_outside_are_refused(store):
    for number in (-1, len(store)):
        with pytest.raises(IndexError):
            store.blocks(np.array([0, number]))


def test_a_store_can_go_to_another_process(store):
    store.blocks(np.array([0]))
    assert np.array_equal(pickle.loads(pickle.dumps(store)).blocks(np.array([3])), store.blocks(np.array([3])))  # noqa: S301


def test_a_flipped_byte_is_found_and_named(store):
    store.verify()
    for file in sorted(store.folder.glob("*.bin")):
        content = file.read_bytes()
        file.write_bytes(content[:5] + bytes([content[5] ^ 1]) + content[6:] if len(content) > 5 else b"\xff" * 4)
        with pytest.raises(StoreCorrupted, match=file.name) as caught:
            TokenStore.open(store.folder).verify()
        expected = next(f["sha256"] for f in store._files() if f["file"] == file.name)
        assert expected in caught.value.what
        assert caught.value.what.count("sha256") == 1
        file.write_bytes(content)
    TokenStore.open(store.folder).verify()


def test_a_file_that_the_disk_cannot_read_is_named(store, monkeypatch):
    bad = sorted(store.folder.glob("*.bin"))[-1]

    def refuse(path, number):
        raise OSError(number, os.strerror(number), str(path))

    digest = disk.file_sha256
    for number, kind in ((errno.EBADMSG, StoreCorrupted), (errno.EIO, OSError), (errno.ESTALE, OSError)):
        monkeypatch.setattr(
            disk, "file_sha256", lambda path, number=number: refuse(path, number) if path == bad else digest(path)
        )
        with pytest.raises(kind, match=f"{bad.name}.*{os.strerror(number)}|{os.strerror(number)}.*{bad.name}"):
            store.verify()


@pytest.mark.slow
def test_a_flipped_bit_anywhere_in_the_index_is_found(store):
    path = store.folder / "index.json"
    content = path.read_bytes()
    for place in range(content.index(b'"index_sha256"')):
        changed = content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
        path.write_bytes(changed)
        if _says(changed) == _says(content):  # spaces between its parts
            TokenStore.open(store.folder).verify()
            continue
        with pytest.raises(StoreCorrupted, match=r"index\.json"):
            TokenStore.open(store.folder)


def _says(content: bytes) -> object:
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_an_index_of_an_earlier_version_has_no_checksum(store):
    path = store.folder / "index.json"
    index = json.loads(path.read_text())
    assert index.pop("index_sha256")
    path.write_text(json.dumps(index))
    assert len(TokenStore.open(store.folder)) == len(store)
    del index["sequence_length"]
    path.write_text(json.dumps(index))
    with pytest.raises(StoreCorrupted, match=r"incomplete .*sequence_length"):
        TokenStore.open(store.folder)


def test_a_truncated_or_missing_shard_is_named(store):
    file = store.folder / "tokens-00001.bin"
    content = file.read_bytes()
    file.write_bytes(content[:-2])
    with pytest.raises(StoreCorrupted, match=f"tokens-00001.bin has {len(content) - 2} bytes, but {len(content)} were"):
        TokenStore.open(store.folder)
    file.unlink()
    with pytest.raises(StoreCorrupted, match=r"tokens-00001.bin is missing"):
        TokenStore.open(store.folder)


def test_an_unusable_index_is_named(store, tmp_path):
    with pytest.raises(DataError, match=r"index.json is missing"):
        TokenStore.open(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"index.json is missing"):
        TokenStore.open(tmp_path / "file")
    index = store.folder / "index.json"
    content = index.read_text()
    index.unlink()
    index.mkdir()
    with pytest.raises(StoreCorrupted, match=r"index.json cannot be read: Is a directory"):
        TokenStore.open(store.folder)
    index.rmdir()
    index.write_text(content[:40])
    with pytest.raises(StoreCorrupted, match=r"index.json is not valid JSON"):
        TokenStore.open(store.folder)
    index.write_text(json.dumps(json.loads(content) | {"format": "something else"}))
    with pytest.raises(StoreCorrupted, match=r"something else"):
        TokenStore.open(store.folder)


def test_nothing_is_left_of_a_writer_that_is_not_published(tmp_path):
    with StoreWriter(tmp_path / "train", sequence_length=4, vocabulary_size=9, end_token=2) as writer:
        writer.append(np.arange(9), np.array([9]), np.array([9]))
        writer.finish()
        assert list(tmp_path.iterdir()) == [tmp_path / "train.partial"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch, number):
    write(tmp_path / "train", [[5] * 100])
    before = (tmp_path / "train" / "index.json").read_bytes()

    def no_space(self, content):
        raise OSError(number, "no space")

    monkeypatch.setattr(HashedFile, "write", no_space)
    with pytest.raises(DiskFull, match="no space"):
        write(tmp_path / "train", [[6] * 100])
    assert [path.name for path in tmp_path.iterdir()] == ["train"]  # the older result is still whole
    assert (tmp_path / "train" / "index.json").read_bytes() == before


def test_other_errors_of_the_system_are_not_called_a_full_disk(tmp_path, monkeypatch):
    def refused(self, content):
        raise OSError(errno.EACCES, "not allowed")

    monkeypatch.setattr(HashedFile, "write", refused)
    with pytest.raises(PermissionError):
        write(tmp_path / "train", [[6] * 100])


def test_a_store_of_many_shards_does_not_use_up_a_process_files(tmp_path, monkeypatch):
    """A mapped file keeps its descriptor: the paper's 470 shards and their documents met the usual limit of 1,024."""
    monkeypatch.setattr("resource.getrlimit", lambda which: (1024, 4096))
    write(tmp_path / "store", [[3] * 7] * 400, shard_tokens=8)
    store, before = TokenStore.open(tmp_path / "store"), len(os.listdir("/proc/self/fd"))
    assert len(store) == 400
    every = np.arange(400)
    assert store.blocks(every).shape == store.documents(every).shape == (400, 8)
    assert len(os.listdir("/proc/self/fd")) - before < 2 * 70


def test_the_system_is_told_which_blocks_come_next(tmp_path, monkeypatch):
    """It is not to read ahead: 16 times too much at the usual 128 kB. Then it would wait for each page in turn."""
    told = []

    class Recorded(mmap.mmap):
        def madvise(self, option, *where):
            told.append((option, *where))
            super().madvise(option, *where)

    monkeypatch.setattr("minima.data.store.mmap.mmap", Recorded)
    length = mmap.PAGESIZE // 2 * 3 // 2  # of two bytes each: every second block begins within a page
    write(tmp_path / "store", [[3] * (4 * length - 1)], sequence_length=length, shard_tokens=4 * length)
    TokenStore.open(tmp_path / "store").blocks(np.array([2, 1]))
    page, block = mmap.PAGESIZE, 2 * length
    assert told.pop(0) == (mmap.MADV_RANDOM,)
    assert told == [(mmap.MADV_WILLNEED, 3 * page, block), (mmap.MADV_WILLNEED, page, block + page // 2)]


def test_documents_look_only_at_the_shards_of_their_blocks(tmp_path):
    class Counted(list):
        def __getitem__(self, number):
            looked_at.append(number)
            return super().__getitem__(number)

        def __iter__(self):
            return (self[number] for number in range(len(self)))

    write(tmp_path / "store", [[3] * 7] * 40, shard_tokens=16)
    store, looked_at = TokenStore.open(tmp_path / "store"), []
    store._shards = Counted(store._shards)
    assert store.document_starts(5, 8).tolist() == [40, 48, 56]
    assert set(looked_at) == {2, 3}


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_share_the_bytes_to_verify(tmp_path, monkeypatch, ranks):
    """Each shard has one large and one small file: with every other file, half of the ranks would read next to none."""
    write(tmp_path / "store", [[3] * 15] * 48, shard_tokens=64)
    store, read = TokenStore.open(tmp_path / "store"), [0] * ranks
    for rank in range(ranks):

        def counted(path, size, sha256, rank=rank):
            read[rank] += size
            return ""

        with monkeypatch.context() as patch:
            patch.setattr("minima.data.store.file_fault", counted)
            store.verify(rank, ranks)
    assert read == [store.file_bytes // ranks] * ranks

"""A checkpoint is complete or it does not count; a full disk takes nothing that was there."""

import errno
import json
import os
import threading
from pathlib import Path

import pytest
import torch.distributed as dist
from safetensors import SafetensorError

from minima.engine import distributed
from minima.engine.checkpoint import writer as writing
from minima.engine.checkpoint.store import FORMAT, drop_after, read_marker, verify_checkpoint, verify_together
from minima.engine.checkpoint.writer import CheckpointWriter
from minima.errors import CheckpointError, DiskFull, StoreCorrupted
from minima.models.layout import complete_steps, step_folder
from tests.checkpoints import write_checkpoint


@pytest.fixture(scope="module", autouse=True)
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def files(content: bytes):
    def write(folder):
        (folder / "weights").write_bytes(content)
        return [folder / "weights"]

    return write


def test_the_newest_stay(tmp_path):
    for step in (3, 6, 9):
        write_checkpoint(tmp_path, step, files(b"%d" % step), {"step": step}, keep=2)
    assert complete_steps(tmp_path) == [6, 9]
    assert read_marker(step_folder(tmp_path, 9))["step"] == 9
    verify_checkpoint(step_folder(tmp_path, 9))
    write_checkpoint(tmp_path, 9, files(b"again"), {"step": 9}, keep=0)
    assert (step_folder(tmp_path, 9) / "weights").read_bytes() == b"again"


def several(folder):
    names = [folder / name for name in ("a-0", "a-1", "b-0", "b-1", "b-2")]
    for path in names:
        path.write_bytes(path.name.encode())
    return names


def test_every_file_is_checked_by_one_of_the_ranks(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path, 3, several, {"step": 3}, keep=0)

    def finders(prefix):
        found = []
        for rank in range(2):
            monkeypatch.setattr(distributed, "share", lambda rank=rank: (rank, 2))
            try:
                verify_together(checkpoint, prefix)
            except StoreCorrupted:
                found.append(rank)
        return found

    for path in several(checkpoint):
        path.write_bytes(b"other")
        assert len(finders("")) == 1 and len(finders("b")) == (path.name[0] == "b"), path.name
        several(checkpoint)
    assert finders("") == []


def test_the_marker_has_the_checksums_of_all_ranks(tmp_path, monkeypatch):
    other = writing._Report(sha256={"of-rank-1": "1"}, num_bytes=5, seconds=1000.0)
    gathered = {writing._Report: [other]}
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, *gathered.get(type(own), [])])
    facts = read_marker(write_checkpoint(tmp_path, 3, files(b"12"), {"step": 3}, keep=0))
    assert set(facts["sha256"]) == {"weights", "of-rank-1"}
    assert (facts["save_bytes"], facts["save_seconds"]) == (7, 1000.0)


def test_any_failure_of_the_writing_thread_is_told(tmp_path):
    def fail(folder):
        raise RuntimeError("no memory for a copy")

    with pytest.raises(CheckpointError, match="rank 0: RuntimeError: no memory for a copy"):
        write_checkpoint(tmp_path, 3, fail, {"step": 3}, keep=0)
    assert complete_steps(tmp_path) == []


def test_what_a_cut_off_save_or_removal_left_goes_too(tmp_path):
    write_checkpoint(tmp_path, 3, files(b"3"), {"step": 3}, keep=0)
    for name in ("step-00000001", "step-00000004.partial", "other"):
        (tmp_path / name).mkdir()
    write_checkpoint(tmp_path, 6, files(b"6"), {"step": 6}, keep=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "step-00000003", "step-00000006"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_named_and_loses_nothing(tmp_path, error):
    write_checkpoint(tmp_path, 3, files(b"3"), {"step": 3}, keep=1)

    def fail(folder):
        (folder / "weights").write_bytes(b"half")
        raise error

    with pytest.raises(DiskFull, match="resumes from its last checkpoint"):
        write_checkpoint(tmp_path, 6, fail, {"step": 6}, keep=1)
    assert complete_steps(tmp_path) == [3]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_another_failure_is_not_called_a_full_disk(tmp_path):
    def fail(folder):
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(CheckpointError, match="Permission denied"):
        write_checkpoint(tmp_path, 6, fail, {"step": 6}, keep=1)


def test_a_missing_file_and_a_flipped_bit_are_found(tmp_path):
    path = write_checkpoint(tmp_path, 3, files(b"bytes"), {"step": 3}, keep=0)
    (path / "weights").write_bytes(b"bytfs")
    with pytest.raises(StoreCorrupted, match="weights is damaged"):
        verify_checkpoint(path)
    (path / "weights").unlink()
    with pytest.raises(StoreCorrupted, match="no file"):
        verify_checkpoint(path)


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    (tmp_path / "checkpoint.json").write_text('{"format": "other"}')
    with pytest.raises(CheckpointError, match="other"):
        read_marker(tmp_path)


def test_those_after_a_multiple_of_steps_stay(tmp_path):
    writer = CheckpointWriter(tmp_path, keep=1, keep_every_steps=10)
    for step in (5, 10, 15, 20, 25):
        writer.begin(step, lambda: files(b"x"), {"step": step})
        writer.finish()
    assert complete_steps(tmp_path) == [10, 20, 25]


def test_it_counts_once_it_is_finished_and_says_what_it_cost(tmp_path):
    writer, let_go = CheckpointWriter(tmp_path, keep=0), threading.Event()

    def slow(folder):
        let_go.wait(10)
        return files(b"slow")(folder)

    writer.begin(3, lambda: slow, {"step": 3})
    assert writer.writing and complete_steps(tmp_path) == []
    threading.Timer(0.3, let_go.set).start()
    writer.begin(6, lambda: files(b"fast"), {"step": 6})  # waits for the one before it
    assert complete_steps(tmp_path) == [3]
    writer.finish()
    assert complete_steps(tmp_path) == [3, 6] and not writer.writing
    marker = read_marker(step_folder(tmp_path, 3))
    assert marker["save_bytes"] == 4 and marker["save_seconds"] >= 0.2
    times = writer.take_times()
    assert times["checkpoint_wait_seconds"] >= 0.2 and times["checkpoint_bytes"] == 4
    assert writer.take_times() == {}


def test_an_error_of_another_kind_in_the_thread_is_told_too(tmp_path):
    def broken(folder):
        raise ZeroDivisionError("of our own")

    writer = CheckpointWriter(tmp_path, keep=0)
    writer.begin(3, lambda: broken, {"step": 3})
    with pytest.raises(CheckpointError, match="ZeroDivisionError: of our own"):
        writer.finish()
    assert not list(tmp_path.iterdir())


def test_those_that_are_named_stay(tmp_path):
    writer = CheckpointWriter(tmp_path, keep=1, named={2, 6})
    for step in (2, 4, 6, 8):
        writer.begin(step, lambda: files(b"x"), {"step": step}, spare=4)
        writer.finish()
    assert complete_steps(tmp_path) == [2, 4, 6, 8]
    writer.begin(10, lambda: files(b"x"), {"step": 10})
    writer.finish()
    assert complete_steps(tmp_path) == [2, 6, 10]


def test_names_that_minima_does_not_give_are_left_alone(tmp_path):
    """A copy with a number of its own, a file, digits that are none: nothing of them is looked at or removed."""
    (tmp_path / "step-500").mkdir()
    (tmp_path / "step-500" / "checkpoint.json").write_text("{}")
    (tmp_path / "step-00000007").touch()
    (tmp_path / "step-0000000²").mkdir()
    writer = CheckpointWriter(tmp_path, keep=1)
    for step in (2, 4):
        writer.begin(step, lambda: files(b"x"), {"step": step})
        writer.finish()
    assert complete_steps(tmp_path) == [4]
    assert {path.name for path in tmp_path.iterdir()} == {
        "step-500", "step-00000007", "step-0000000²", "step-00000004",
    }  # fmt: skip


@pytest.mark.parametrize(
    "content",
    ["[]", "3", '"x"', {"sha256": []}, {}, {"sha256": {}, "ranks": 0}, {"sha256": {}, "ranks": "2"},
     {"sha256": {}, "shapes": 1}, {"sha256": {}, "config": None}, {"sha256": {}}, {"format": None}, {"format": 1}],
)  # fmt: skip
def test_a_marker_that_is_json_and_no_marker_is_damaged(tmp_path, content):
    text = content if isinstance(content, str) else json.dumps({"format": FORMAT} | content)
    (tmp_path / "checkpoint.json").write_text(text)
    with pytest.raises(StoreCorrupted, match=r"checkpoint\.json is damaged"):
        read_marker(tmp_path)


def test_one_that_cannot_be_removed_ends_no_training(tmp_path, monkeypatch, caplog):
    write_checkpoint(tmp_path, 3, files(b"3"), {"step": 3}, keep=1)

    unlink = Path.unlink

    def refuse(path, missing_ok=False):
        if "step-00000003" in str(path) or (path.parent == step_folder(tmp_path, 6) and path.is_file()):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    write_checkpoint(tmp_path, 6, files(b"6"), {"step": 6}, keep=1)
    assert complete_steps(tmp_path) == [3, 6] and "step-00000003 cannot be removed, so it stays" in caplog.text
    with pytest.raises(CheckpointError, match=r"checkpoints after step 3 .* cannot be removed"):
        drop_after(tmp_path, 3)


def test_what_one_rank_refuses_all_refuse(monkeypatch):
    met = []
    monkeypatch.setattr(distributed, "raise_together", met.append)
    with distributed.refused_together():
        pass
    with distributed.refused_together():
        raise DiskFull("a", "b", "c")
    with distributed.refused_together(lambda error: CheckpointError(str(error), "b", "c")):
        raise OSError("torn")
    with pytest.raises(OSError, match="torn"), distributed.refused_together():
        raise OSError("torn")
    assert [getattr(error, "what", None) for error in met] == [None, "a", "torn"]


def test_those_after_the_best_one_go_and_it_stays(tmp_path):
    for step in (2, 4, 6, 8):
        write_checkpoint(tmp_path, step, files(b"x"), {"step": step}, keep=0)
    drop_after(tmp_path, 4)
    assert complete_steps(tmp_path) == [2, 4]


def test_every_file_is_on_disk_before_its_checkpoint_counts(tmp_path, monkeypatch):
    """After a power cut a marker must not stand beside files that the system had not written yet."""
    order: list[str] = []
    rename = Path.rename
    monkeypatch.setattr(writing, "sync", lambda path: order.append(f"sync {path.name}"))
    monkeypatch.setattr(Path, "rename", lambda path, to: order.append(f"rename {path.name}") or rename(path, to))
    path = write_checkpoint(tmp_path, 3, files(b"3"), {"step": 3}, keep=0)
    assert order == [
        "sync weights", "sync checkpoint.json", f"sync {path.name}.partial", f"rename {path.name}.partial",
        f"sync {tmp_path.name}",
    ]  # fmt: skip

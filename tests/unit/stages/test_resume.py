"""The newest whole checkpoint is taken; damaged ones are named, kept aside, and never silently all passed over."""

import errno
import hashlib
import os
from pathlib import Path

import pytest
import torch.distributed as dist

from minima.engine.checkpoint import store
from minima.engine.checkpoint.store import read_marker, verify_together
from minima.errors import AccessRefused, CheckpointError, FileFailed, StoreCorrupted
from minima.models.layout import complete_steps, step_folder
from minima.stages import resume
from tests.checkpoints import write_checkpoint


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """A process group of this process, and no engine: a checkpoint's marker is all that is loaded."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())

    def load(student, checkpoint):
        verify_together(checkpoint)
        return read_marker(checkpoint)

    monkeypatch.setattr(resume, "load_shards", load)
    yield
    dist.destroy_process_group()


def write(folder, *steps):
    for step in steps:

        def files(path, step=step):
            (path / "weights").write_bytes(b"%d" % step)
            return [path / "weights"]

        write_checkpoint(folder, step, files, {"step": step}, keep=0)


def damage(folder, step):
    (step_folder(folder, step) / "weights").write_bytes(b"?")


def unreadable(monkeypatch, bad, number):
    """Opening works and reading fails, so the system names no file."""
    opened, digest = {}, hashlib.file_digest
    path_open, read_text = Path.open, Path.read_text

    def refuse():
        raise OSError(number, os.strerror(number))

    def note(path, *how, **more):
        file = path_open(path, *how, **more)
        opened[file.fileno()] = path
        return file

    monkeypatch.setattr(Path, "open", note)
    monkeypatch.setattr(Path, "read_text", lambda path, **how: refuse() if path == bad else read_text(path, **how))
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, name: refuse() if opened[file.fileno()] == bad else digest(file, name)
    )


def test_the_newest_whole_one(tmp_path, caplog):
    write(tmp_path, 5, 10, 15)
    damage(tmp_path, 15)
    facts = resume.load_newest(None, tmp_path)
    assert facts["step"] == 10 and complete_steps(tmp_path) == [5, 10]
    assert "step-00000015/weights is damaged" in caplog.text
    assert (tmp_path / "step-00000015.damaged" / "weights").read_bytes() == b"?"


def test_one_that_may_not_be_read_is_not_set_aside(tmp_path, monkeypatch):
    write(tmp_path, 5, 10)

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(store, "file_sha256", refuse)
    with pytest.raises(AccessRefused, match="step-00000010/weights: Permission denied"):
        resume.load_newest(None, tmp_path)
    assert complete_steps(tmp_path) == [5, 10]


@pytest.mark.parametrize("name", ["weights", "checkpoint.json"])
@pytest.mark.parametrize("number", [errno.EUCLEAN, errno.EBADMSG])
def test_one_that_the_file_system_calls_damaged_is_set_aside(tmp_path, monkeypatch, caplog, name, number):
    write(tmp_path, 5, 10)
    bad = step_folder(tmp_path, 10) / name
    unreadable(monkeypatch, bad, number)
    assert resume.load_newest(None, tmp_path)["step"] == 5
    assert f"{bad} is damaged: {os.strerror(number)}" in caplog.text
    assert (tmp_path / "step-00000010.damaged").is_dir()


@pytest.mark.parametrize("name", ["weights", "checkpoint.json"])
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_one_whose_disk_or_file_server_fails_stays_and_is_named(tmp_path, monkeypatch, name, number):
    """Perhaps on this node alone: renaming it, and the one before it, would lose all of them."""
    write(tmp_path, 5, 10)
    bad = step_folder(tmp_path, 10) / name
    unreadable(monkeypatch, bad, number)
    with pytest.raises(FileFailed, match=f"{bad} cannot be read: {os.strerror(number)}") as refused:
        resume.load_newest(None, tmp_path)
    assert f"remove {step_folder(tmp_path, 10)} to continue from the checkpoint before it" in refused.value.do
    assert complete_steps(tmp_path) == [5, 10]


@pytest.mark.parametrize("closed", ["step-00000010/checkpoint.json", ""])
def test_what_may_not_be_looked_at_is_not_passed_over(tmp_path, monkeypatch, closed):
    write(tmp_path, 5, 10)

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    look, listdir = Path.stat, os.listdir
    refused = tmp_path / closed
    monkeypatch.setattr(
        Path, "stat", lambda path, **how: refuse(path) if path == refused and closed else look(path, **how)
    )
    monkeypatch.setattr(os, "listdir", lambda path: refuse(path) if path == refused else listdir(path))
    with pytest.raises(PermissionError, match=closed or tmp_path.name):
        resume.load_newest(None, tmp_path)


def test_a_marker_that_may_not_be_read_is_no_missing_one(tmp_path, monkeypatch):
    write(tmp_path, 5)

    def refuse(path, **how):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(AccessRefused, match=r"checkpoint\.json: Permission denied"):
        resume.load_newest(None, tmp_path)


def test_without_any_there_is_nothing_to_load(tmp_path):
    assert resume.load_newest(None, tmp_path) is None


def test_where_all_are_damaged_the_run_does_not_start_again(tmp_path):
    write(tmp_path, 5, 10)
    damage(tmp_path, 5)
    damage(tmp_path, 10)
    with pytest.raises(CheckpointError, match=r"(?s)step-00000010/weights.*step-00000005/weights.*start again"):
        resume.load_newest(None, tmp_path)
    with pytest.raises(CheckpointError, match=r"step-00000005\.damaged; step-00000010\.damaged") as refused:
        resume.load_newest(None, tmp_path)  # nor does the next start
    assert f"remove {tmp_path} and everything in it to train again from the first step" in refused.value.do
    write(tmp_path, 5)  # a copy is brought back
    assert resume.load_newest(None, tmp_path)["step"] == 5


def test_a_checkpoint_without_its_marker_is_no_reason_to_start_again(tmp_path):
    write(tmp_path, 5)
    (step_folder(tmp_path, 5) / "checkpoint.json").unlink()
    with pytest.raises(CheckpointError, match="usable: step-00000005\n"):
        resume.load_newest(None, tmp_path)


def test_a_first_save_that_was_cut_short_is_nothing_to_go_on_from(tmp_path):
    (tmp_path / "step-00000005.partial").mkdir()
    assert resume.load_newest(None, tmp_path) is None


@pytest.mark.parametrize("change", [lambda text: text[:-9], lambda text: text.replace('"step": 10', '"step": 11')])
def test_a_marker_that_is_torn_or_changed(tmp_path, change):
    write(tmp_path, 5, 10)
    marker = step_folder(tmp_path, 10) / "checkpoint.json"
    marker.write_text(change(marker.read_text()))
    with pytest.raises(StoreCorrupted, match="is damaged"):
        read_marker(marker.parent)
    assert resume.load_newest(None, tmp_path)["step"] == 5


def test_a_damaged_one_that_cannot_be_renamed_is_named(tmp_path, monkeypatch):
    write(tmp_path, 5, 10)
    damage(tmp_path, 10)

    def refuse(checkpoint):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(checkpoint))

    monkeypatch.setattr(resume, "set_aside", refuse)
    with pytest.raises(CheckpointError, match=r"weights is damaged.* cannot be renamed"):
        resume.load_newest(None, tmp_path)


def test_a_folder_in_the_markers_place_is_damage(tmp_path):
    write(tmp_path, 5, 10)
    marker = step_folder(tmp_path, 10) / "checkpoint.json"
    marker.unlink()
    marker.mkdir()
    with pytest.raises(StoreCorrupted, match="is a folder"):
        read_marker(marker.parent)

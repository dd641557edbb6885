"""What a stage folder says of itself, and when it can be seen."""

import errno
import os
import time
from pathlib import Path

import pytest
import yaml

from minima.errors import FileFailed, StageError
from minima.stages import manifest
from minima.stages.manifest import (
    STARTED,
    is_begun,
    read_manifest,
    wait_finished,
    write_json,
    write_manifest,
    write_started,
)
from minima.stages.run_folder import access_named

DESCRIPTION = {"stage": {"name": "a"}, "inputs": {}, "identity": "x"}


@pytest.mark.parametrize("content", [b'{"stage": ', b"\xff\xfe", b"[]", b"1"])
def test_a_torn_manifest_is_refused_with_its_path(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(StageError, match=r"/manifest\.json cannot be read") as refused:
        read_manifest(tmp_path)
    assert "remove this one file" in refused.value.do and "remove the folder" not in refused.value.do


def test_a_stage_that_was_interrupted_is_to_be_run_and_not_removed(tmp_path):
    folder = tmp_path / "teacher"
    for name, state in (("manifest.json", "finished"), (STARTED, "started")):
        with pytest.raises(StageError, match=f"stage 'teacher' is not {state}") as refused:
            read_manifest(folder, name)
        assert refused.value.do == "run it first (minima run RECIPE --stages teacher)"
    (folder / "checkpoints" / "step-00000005").mkdir(parents=True)
    write_started(folder, DESCRIPTION)
    with pytest.raises(StageError, match="stage 'teacher' is not finished") as refused:
        read_manifest(folder)
    assert refused.value.do.endswith(f"; it resumes from what {folder} contains") and "remove" not in str(refused.value)


def test_who_is_told_to_remove_a_folder_hears_of_its_checkpoints(tmp_path):
    (tmp_path / STARTED).write_text("{")
    with pytest.raises(StageError, match=r"remove the folder .*: the stage then starts again$"):
        read_manifest(tmp_path, STARTED)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(StageError, match=r"restore it from a copy, .*, and the checkpoints in it are lost$"):
        read_manifest(tmp_path, STARTED)


def test_a_manifest_on_a_disk_that_does_not_answer_is_no_reason_to_remove_anything(tmp_path, monkeypatch):
    def read_text(path, encoding):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(manifest.Path, "read_text", read_text)
    with pytest.raises(StageError, match=r"cannot be read \(.*Permission denied") as refused:
        read_manifest(tmp_path)
    assert "remove" not in refused.value.do and not isinstance(refused.value, FileFailed)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_is_no_mistake_of_the_users(tmp_path, monkeypatch, number):
    """A job's script asks Slurm about a lost node only after an exit code that is not the user's."""

    def refuse(path, encoding="utf-8"):
        raise OSError(number, os.strerror(number), str(path))

    with pytest.raises(FileFailed, match="cannot be used"), access_named(tmp_path):
        refuse(tmp_path)
    monkeypatch.setattr(manifest.Path, "read_text", refuse)
    with pytest.raises(FileFailed, match="cannot be read"):
        read_manifest(tmp_path)


def test_json_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "m.json"
    write_json(path, {"a": 1})
    loop: list = []
    loop.append(loop)
    with pytest.raises(ValueError):
        write_json(path, {"b": loop})
    assert yaml.safe_load(path.read_text()) == {"a": 1}


def test_seconds_are_of_all_starts(tmp_path):
    write_started(tmp_path, DESCRIPTION)
    for worked in (100.0, 20.0):  # two starts that were killed
        began = read_manifest(tmp_path, STARTED)["began"]
        (tmp_path / "metrics.jsonl").touch()
        os.utime(tmp_path / "metrics.jsonl", (began + worked, began + worked))
        write_started(tmp_path, DESCRIPTION)
    write_manifest(tmp_path, {}, 3.0)
    assert read_manifest(tmp_path)["seconds"] == pytest.approx(123.0, abs=0.01)
    assert read_manifest(tmp_path)["earlier_seconds"] == pytest.approx(120.0, abs=0.01)


def test_a_start_that_left_nothing_worked_for_nothing(tmp_path):
    write_started(tmp_path, DESCRIPTION)
    old = time.time() - 1000
    (tmp_path / "tokenizer.json").touch()
    os.utime(tmp_path / "tokenizer.json", (old, old))  # copied with its time
    write_started(tmp_path, DESCRIPTION)
    write_manifest(tmp_path, {}, 3.0)
    assert read_manifest(tmp_path)["seconds"] == 3.0


def test_begun_means_that_something_was_made(tmp_path):
    assert not is_begun(tmp_path / "none")
    write_started(tmp_path, DESCRIPTION)
    (tmp_path / ".started.json.7").touch()
    assert not is_begun(tmp_path)
    (tmp_path / "train.partial").mkdir()
    assert is_begun(tmp_path)


def test_what_another_machine_finished_is_looked_for_in_a_fresh_listing(tmp_path, monkeypatch):
    """A client of NFS goes on saying "no such file" until somebody lists the folder."""
    folder, listed = tmp_path / "a", []

    def listdir(path):
        listed.append(path)
        if listed.count(folder) == 2:  # the first listing came too early
            folder.mkdir()
            (folder / "manifest.json").touch()
        if not path.is_dir():
            raise FileNotFoundError(path)
        return []

    monkeypatch.setattr(manifest.os, "listdir", listdir)
    monkeypatch.setattr(manifest, "_POLL_SECONDS", 0.01)
    assert not wait_finished(folder, 0)
    assert wait_finished(folder, 5)
    assert listed == [tmp_path, folder] * 2


def test_a_start_looks_at_each_checkpoint_that_was_kept_and_not_at_all_their_files(tmp_path, monkeypatch):
    write_started(tmp_path, DESCRIPTION)
    began = read_manifest(tmp_path, STARTED)["began"]
    for step in range(1, 41):
        checkpoint = tmp_path / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        for rank in range(8):
            (checkpoint / f"weights-{rank:05d}").touch()
        os.utime(checkpoint, (began + step, began + step))
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").touch()
    looked, stat = [], Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **given: looked.append(path) or stat(path, **given))
    write_started(tmp_path, DESCRIPTION)
    assert read_manifest(tmp_path, STARTED)["earlier_seconds"] == pytest.approx(40, abs=1)
    assert len(looked) < 100

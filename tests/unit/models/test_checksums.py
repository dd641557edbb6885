"""What a finished stage has left is found missing or changed, by name, before it is read."""

import errno
import json
import os

import pytest
import torch

from minima.engine.weights import open_weights
from minima.errors import AccessRefused, CheckpointError, StoreCorrupted
from minima.models import checksums
from minima.models.checksums import CHECKSUMS, SCORES, WEIGHTS, missing_files, verify_files, write_checksums
from minima.models.shape import ModelShape
from minima.models.weights import RandomSource, write_folder

SHAPE = ModelShape(vocabulary_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1)


@pytest.fixture
def stage(tmp_path):
    source = RandomSource(SHAPE.to_config(), seed=1)
    write_folder(tmp_path / "model", source.config, ((name, source.read(name)) for name in source.names()))
    (tmp_path / "scores.safetensors").write_bytes(b"12345")
    write_checksums(tmp_path)
    assert set(json.loads((tmp_path / CHECKSUMS).read_text())["files"]) == {"model/model.safetensors", SCORES}
    (tmp_path / "manifest.json").write_text("{}")
    return tmp_path


def verify(stage, part=0, parts=1):
    for prefix in (WEIGHTS, SCORES):
        verify_files(stage, prefix, part, parts)


def test_what_is_as_it_was_written_is_read(stage):
    verify(stage)
    assert not missing_files(stage)
    (stage / "model" / "config.json").touch()
    (stage / "model" / "README.md").write_text("edited by hand")
    assert torch.equal(
        open_weights(stage).read("lm_head.weight"), RandomSource(SHAPE.to_config(), 1).read("lm_head.weight")
    )


@pytest.mark.parametrize("how", ["flipped", "cut", "zeros", "gone"])
@pytest.mark.parametrize("name", ["model/model.safetensors", "scores.safetensors"])
def test_another_file_is_refused_by_name(stage, name, how):
    path = stage / name
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
        assert missing_files(stage) == [name]
    else:
        changed = {
            "flipped": content[:-1] + bytes([content[-1] ^ 1]),
            "cut": content[:-1],
            "zeros": bytes(len(content)),
        }
        path.write_bytes(changed[how])
    with pytest.raises(StoreCorrupted, match=f"{name} .*(?s:.*)remove {stage}"):
        verify(stage)
    if name == SCORES:
        assert open_weights(stage).names(), "what is not read may be gone, or another"
        verify_files(stage, WEIGHTS)
        return
    with pytest.raises(StoreCorrupted, match=name):
        open_weights(stage)
    verify_files(stage, WEIGHTS, 1, 2)  # the other rank's share
    verify_files(stage, SCORES)


def test_what_may_not_be_read_is_not_called_damaged(stage, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(checksums, "file_sha256", refuse)
    with pytest.raises(AccessRefused, match=r"model\.safetensors: Permission denied"):
        open_weights(stage)


def test_a_file_of_this_name_from_elsewhere_is_none_of_ours(tmp_path):
    source = RandomSource(SHAPE.to_config(), seed=1)
    write_folder(tmp_path, source.config, ((name, source.read(name)) for name in source.names()))
    for content in ('{"model.safetensors": "ab12"}', '{"format": "other", "files": 3}', "ab12  model.safetensors"):
        (tmp_path / CHECKSUMS).write_text(content)
        assert open_weights(tmp_path).names()


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"files": {"model/a": {"bytes": 1}}}', '{"files": {"a": 3}}', '{"files": 3}',
     '{"files": {"model/../../x": {"bytes": 1, "sha256": ""}}}'],
)  # fmt: skip
def test_checksums_that_are_none_are_refused(stage, content):
    (stage / CHECKSUMS).write_text(content)
    with pytest.raises(StoreCorrupted):
        verify(stage)


def test_a_folder_of_an_earlier_version_or_from_elsewhere_is_taken_as_it_is(stage):
    (stage / CHECKSUMS).unlink()
    (stage / "scores.safetensors").write_bytes(b"other")
    verify(stage)
    assert not missing_files(stage) and open_weights(stage).names()


def test_the_checkpoints_of_a_training_stage_that_are_gone_are_told_as_such(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}))
    with pytest.raises(CheckpointError, match=r"checkpoints is not there any more"):
        open_weights(tmp_path)

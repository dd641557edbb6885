"""What a finished stage has left is found missing or changed, by name, before it is read."""

import errno
import json
import os
import shutil

import pytest
import torch

from minima.disk import file_sha256
from minima.engine import weights
from minima.engine.checkpoint.store import FORMAT
from minima.engine.weights import open_weights
from minima.errors import AccessRefused, CheckpointError, StoreCorrupted
from minima.models import checksums
from minima.models.checksums import (
    CHECKSUMS,
    SCORES,
    WEIGHTS,
    missing_files,
    verify_files,
    verify_tokenizer,
    write_checksums,
)
from minima.models.layout import MARKER, step_folder
from minima.models.shape import ModelShape
from minima.models.weights import RandomSource, write_folder

SHAPE = ModelShape(vocabulary_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1)


@pytest.fixture
def stage(tmp_path):
    source = RandomSource(SHAPE.to_config(), seed=1)
    write_folder(tmp_path / "model", source.config, ((name, source.read(name)) for name in source.names()))
    (tmp_path / "scores.safetensors").write_bytes(b"12345")
    write_checksums(tmp_path)
    named = set(json.loads((tmp_path / CHECKSUMS).read_text())["files"])
    assert named == {"model/config.json", "model/model.safetensors", SCORES}
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
@pytest.mark.parametrize("name", ["model/config.json", "model/model.safetensors", "scores.safetensors"])
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
    verify_files(stage, WEIGHTS, int(name == "model/config.json"), 2)  # the other rank's share
    verify_files(stage, SCORES)


def test_what_may_not_be_read_is_not_called_damaged(stage, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(checksums, "file_sha256", refuse)
    with pytest.raises(AccessRefused, match=r"model/config\.json: Permission denied"):
        open_weights(stage)


def test_a_file_of_this_name_from_elsewhere_is_none_of_ours(tmp_path):
    source = RandomSource(SHAPE.to_config(), seed=1)
    write_folder(tmp_path, source.config, ((name, source.read(name)) for name in source.names()))
    for content in ('{"model.safetensors": "ab12"}', '{"format": "other", "files": 3}', "ab12  model.safetensors"):
        (tmp_path / CHECKSUMS).write_text(content)
        assert open_weights(tmp_path).names()


def test_quantised_weights_are_not_read_as_if_they_were_none(stage):
    config = RandomSource(SHAPE.to_config(), seed=1).config | {"quantization_config": {"quant_method": "fp8"}}
    (stage / "model" / "config.json").write_text(json.dumps(config))
    (stage / CHECKSUMS).unlink()
    with pytest.raises(CheckpointError, match="its weights are quantised"):
        open_weights(stage)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"files": {"model/a": {"bytes": 1}}}', '{"files": {"a": 3}}', '{"files": 3}',
     '{"files": {"model/../../x": {"bytes": 1, "sha256": ""}}}', '{"files": {}, "editable": [3]}'],
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
    with pytest.raises(CheckpointError, match=r"checkpoints no longer exists"):
        open_weights(tmp_path)


def trained(folder, steps, shards=("weights-00000-of-00001.safetensors", "exp_avg-00000-of-00001.safetensors")):
    """A finished training stage's folder with checkpoints after these steps, each with content of its own."""
    for step in steps:
        checkpoint = step_folder(folder / "checkpoints", step)
        checkpoint.mkdir(parents=True)
        for name in shards:
            (checkpoint / name).write_text(f"{name} {step}")
        hashes = {name: file_sha256(checkpoint / name) for name in shards}
        (checkpoint / MARKER).write_text(json.dumps({"format": FORMAT, "step": step, "sha256": hashes}))
    (folder / "metrics.jsonl").write_text("")
    write_checksums(folder)
    (folder / "manifest.json").write_text("{}")
    return folder


@pytest.fixture
def opened(monkeypatch):
    """The folder of the checkpoint that `open_weights` takes; the weights themselves are nobody's here."""
    monkeypatch.setattr(weights, "CheckpointSource", lambda checkpoint: checkpoint.name)
    return open_weights


@pytest.mark.parametrize("how", ["marker", "folder", "all but it"])
def test_an_older_checkpoint_is_not_taken_for_a_finished_stages_result(tmp_path, opened, how):
    student = trained(tmp_path / "student", (50, 55, 60))
    assert opened(student) == "step-00000060" and not missing_files(student)
    last = student / "checkpoints" / "step-00000060"
    if how == "marker":
        (last / "checkpoint.json").unlink()
    else:
        shutil.rmtree(last)
    if how == "all but it":
        shutil.rmtree(student / "checkpoints" / "step-00000050")
        shutil.rmtree(student / "checkpoints" / "step-00000055")
    with pytest.raises(CheckpointError, match=r"student/checkpoints/step-00000060 no longer exists") as error:
        opened(student)
    assert ("student@50, student@55" in error.value.do) == (how != "all but it")
    assert f"remove {student} and everything made from it, to train it again" in error.value.do
    assert missing_files(student) == ["checkpoints/step-00000060/checkpoint.json"]
    if how != "all but it":
        assert opened(student, 55) == "step-00000055", "asked for by its step"
    (student / "manifest.json").unlink()
    if how != "all but it":
        assert opened(student) == "step-00000055", "of an unfinished stage, the newest one"


def test_what_a_purge_has_taken_of_a_result_is_told(tmp_path, opened):
    student = trained(tmp_path / "student", (55, 60))
    last = student / "checkpoints" / "step-00000060"
    (last / "exp_avg-00000-of-00001.safetensors").unlink()
    shutil.rmtree(student / "checkpoints" / "step-00000055")
    assert not missing_files(student) and opened(student) == "step-00000060", "nobody reads these any more"
    (last / "weights-00000-of-00001.safetensors").unlink()
    assert missing_files(student) == ["checkpoints/step-00000060/weights-00000-of-00001.safetensors"]
    with pytest.raises(StoreCorrupted, match=r"(?s)weights-00000-of-00001\.safetensors is damaged.*to train it again"):
        opened(student)
    (last / MARKER).write_text('{"sha256": [1]}')
    assert missing_files(student) == [], "what a damaged marker says is its reader's to refuse"
    shutil.rmtree(student / "checkpoints")
    assert missing_files(student) == ["checkpoints/step-00000060/checkpoint.json"]


def test_another_runs_checkpoint_of_the_same_step_is_refused(tmp_path, opened):
    student = trained(tmp_path / "student", (55, 60))
    other = trained(tmp_path / "other", (60,), shards=("weights-other",))
    shutil.rmtree(student / "checkpoints" / "step-00000060")
    shutil.copytree(other / "checkpoints" / "step-00000060", student / "checkpoints" / "step-00000060")
    with pytest.raises(StoreCorrupted, match=r"(?s)step-00000060/checkpoint\.json .*name one .*student@55"):
        opened(student)


def test_of_an_earlier_versions_stage_the_newest_checkpoint_is_taken(tmp_path, opened):
    student = trained(tmp_path / "student", (55, 60))
    (student / CHECKSUMS).unlink()
    shutil.rmtree(student / "checkpoints" / "step-00000060")
    assert opened(student) == "step-00000055" and not missing_files(student)


@pytest.mark.parametrize("place", ["tokenizer", "model"])
def test_a_tokenizer_is_compared_and_an_exports_may_be_edited(tmp_path, place):
    (tmp_path / place).mkdir()
    names = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        (tmp_path / place / name).write_text("{}")
    (tmp_path / place / ".nfs0001").touch()
    write_checksums(tmp_path)
    (tmp_path / place / ".nfs0001").unlink()
    (tmp_path / "manifest.json").write_text("{}")
    verify_tokenizer(tmp_path)
    for name in names:
        path = tmp_path / place / name
        path.write_text("[]")
        with pytest.raises(StoreCorrupted, match=f"{place}/{name} is damaged"):
            verify_tokenizer(tmp_path)
        path.unlink()
        with pytest.raises(StoreCorrupted, match=f"{place}/{name} is missing"):
            verify_tokenizer(tmp_path)
        assert missing_files(tmp_path) == [f"{place}/{name}"]
        path.write_text("{}")
    write_checksums(tmp_path, editable=True)
    (tmp_path / place / "chat_template.jinja").write_text("another")
    (tmp_path / place / "tokenizer.json").unlink()
    verify_tokenizer(tmp_path)
    verify_files(tmp_path, WEIGHTS)
    assert missing_files(tmp_path) == [f"{place}/tokenizer.json"]

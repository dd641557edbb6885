"""What may change between two starts of a stage, and how a change that may not is named."""

import pytest
import yaml

from minima.errors import StageError
from minima.recipe.loading import load_recipe
from minima.stages import manifest
from minima.stages.manifest import check_unchanged, describe, read_manifest, write_json, write_manifest, write_started

RECIPE = """
name: x
stages:
  - {name: corpus, kind: build_data, sources: [{path: text.jsonl}], tokenizer: tok, sequence_length: 64}
  - &t {name: teacher, kind: adapt, model: base, data: corpus, batch_sequences: 8, micro_batch_sequences: 4,
        steps: 4, learning_rate: 1e-3}
  - {name: pruned, kind: prune, model: teacher@2, data: corpus, target: {hidden_size: 16}}
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(RECIPE)
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"12345678")
    return tmp_path


def description(run, name, *overrides):
    recipe = load_recipe(run / "x.yaml", overrides)
    return describe(recipe, recipe.stage(name), run)


def publish(run, name, finished=True):
    (run / name).mkdir(exist_ok=True)
    write_started(run / name, description(run, name))
    if finished:
        write_manifest(run / name, {"loss": 1.5}, 2.0)


def test_a_manifest_says_what_it_was_made_from(run):
    publish(run, "corpus")
    publish(run, "teacher")
    content = read_manifest(run / "teacher")
    assert content["stage"]["learning_rate"] == 1e-3
    assert set(content["inputs"]) == {"model (base)", "data (corpus)"}
    assert content["inputs"]["data (corpus)"] == read_manifest(run / "corpus")["identity"]
    assert content["metrics"] == {"loss": 1.5}
    assert {"minima", "torch", "deepspeed", "transformers"} <= set(content["versions"])
    assert content["started"] <= content["finished"]


@pytest.mark.parametrize("finished", [True, False])
def test_a_changed_field_is_refused_by_name(run, finished):
    publish(run, "corpus")
    publish(run, "teacher", finished)
    (run / "teacher" / "metrics.jsonl").touch()
    check_unchanged(description(run, "teacher"), run / "teacher")
    state = "finished" if finished else "half-finished"
    with pytest.raises(StageError, match=rf"'teacher' is {state} in .*learning_rate is 0.002 and was 0.001"):
        check_unchanged(description(run, "teacher", "stages.teacher.learning_rate=2e-3"), run / "teacher")


def test_a_mistake_mended_before_anything_was_made_is_no_change(run):
    publish(run, "corpus")
    publish(run, "teacher", finished=False)
    check_unchanged(description(run, "teacher", "stages.teacher.learning_rate=2e-3"), run / "teacher")


@pytest.mark.parametrize(
    "override",
    ["log_every_steps=1", "keep_checkpoints=9", "micro_batch_sequences=2", "wandb_project=w", "deepspeed=other.json"],
)
def test_what_does_not_change_the_result_may_change(run, override):
    publish(run, "corpus")
    publish(run, "teacher")
    check_unchanged(description(run, "teacher", f"stages.teacher.{override}"), run / "teacher")


def test_the_micro_batch_of_a_prune_stage_may_not(run):
    publish(run, "corpus")
    publish(run, "teacher", finished=False)
    publish(run, "pruned")
    with pytest.raises(StageError, match="micro_batch_sequences"):
        check_unchanged(description(run, "pruned", "stages.pruned.micro_batch_sequences=2"), run / "pruned")


def test_a_changed_text_is_named_and_reaches_later_stages(run):
    publish(run, "corpus")
    publish(run, "teacher")
    (run / "text.jsonl").write_text('{"text": "b"}\n')
    with pytest.raises(StageError, match=r"its input sources.0 \(text.jsonl\) has changed"):
        check_unchanged(description(run, "corpus"), run / "corpus")
    (run / "corpus" / "manifest.json").unlink()
    (run / "corpus" / "started.json").unlink()
    publish(run, "corpus")
    with pytest.raises(StageError, match=r"its input data \(corpus\) has changed"):
        check_unchanged(description(run, "teacher"), run / "teacher")


@pytest.mark.parametrize(("name", "content"), [("model.safetensors", b"123456789"), ("config.json", b"[]")])
def test_a_changed_model_folder_is_named(run, name, content):
    publish(run, "corpus")
    publish(run, "teacher")
    (run / "base" / name).write_bytes(content)
    with pytest.raises(StageError, match=r"its input model \(base\) has changed"):
        check_unchanged(description(run, "teacher"), run / "teacher")


def test_a_large_file_counts_by_its_ends_and_size(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "_EDGE_BYTES", 4)
    path, seen = tmp_path / "f", set()
    for content in (b"abcd....wxyz", b"Abcd....wxyz", b"abcd....wxyZ", b"abcd...wxyz", b"abc", b"abcdwxyz", b"abcdwx"):
        path.write_bytes(content)
        seen.add(manifest._file_digest(path))
    assert len(seen) == 7


def test_a_torn_manifest_is_refused_with_its_path(run):
    publish(run, "corpus")
    (run / "corpus" / "manifest.json").write_text('{"stage": ')
    with pytest.raises(StageError, match=r"corpus/manifest\.json cannot be read"):
        read_manifest(run / "corpus")


def test_json_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "m.json"
    write_json(path, {"a": 1})
    loop: list = []
    loop.append(loop)
    with pytest.raises(ValueError):
        write_json(path, {"b": loop})
    assert yaml.safe_load(path.read_text()) == {"a": 1}

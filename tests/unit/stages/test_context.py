"""Where a stage's inputs lie."""

import dataclasses
import shutil

import pytest

from minima.errors import RecipeError, StageError, StoreCorrupted
from minima.launcher import Launch
from minima.models.checksums import write_checksums
from minima.recipe.loading import load_recipe
from minima.recipe.schema import BuildData
from minima.stages import build_data
from minima.stages import context as context_module
from minima.stages.context import StageContext

RECIPE = """
name: x
stages:
  - {name: corpus, kind: build_data, sources: [{embedded: sotu}], tokenizer: tok, sequence_length: 64}
  - {name: teacher, kind: adapt, model: base, data: corpus, batch_sequences: 8, micro_batch_sequences: 4, steps: 4,
     learning_rate: 1e-3}
  - {name: pruned, kind: prune, model: teacher, data: corpus, target: {hidden_size: 16}}
  - {name: quality, kind: evaluate, models: [teacher, teacher@2, pruned], data: corpus}
"""


@pytest.fixture
def context(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(RECIPE)
    recipe = load_recipe(path)
    return StageContext(recipe, path, recipe.stage("quality"), tmp_path / "quality", tmp_path, Launch())


def finish(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text("{}")


def test_an_unfinished_stage_is_refused(context):
    with pytest.raises(StageError, match="'corpus' has not finished"):
        context.data("corpus")
    with pytest.raises(StageError, match="'teacher' has not finished"):
        context.model("teacher")


def test_several_ranks_wait_for_what_another_machine_finishes(context, tmp_path, monkeypatch):
    waited = []

    def wait(folder, seconds):
        waited.append(seconds)
        finish(folder)
        return seconds > 0

    monkeypatch.setattr(context_module, "wait_finished", wait)
    with pytest.raises(StageError, match="'corpus' has not finished"):
        context.data("corpus")
    several = dataclasses.replace(context, launch=Launch(1, 2, 0, 1, "h", 1))
    assert several.data("corpus") == tmp_path / "corpus"
    assert waited == [0, 60]


def test_finished_stages_are_found(context, tmp_path):
    for name in ("corpus", "teacher", "pruned"):
        finish(tmp_path / name)
    (tmp_path / "teacher" / "tokenizer").mkdir()
    (tmp_path / "pruned" / "model").mkdir()
    assert context.data("corpus") == tmp_path / "corpus"
    teacher, pruned = context.model("teacher"), context.model("pruned")
    assert (teacher.folder, teacher.step, teacher.tokenizer) == (
        tmp_path / "teacher",
        None,
        tmp_path / "teacher" / "tokenizer",
    )
    assert (pruned.folder, pruned.tokenizer) == (tmp_path / "pruned", tmp_path / "pruned" / "model")


def test_a_checkpoint_of_an_unfinished_stage_may_be_taken(context, tmp_path):
    (first := tmp_path / "teacher" / "checkpoints" / "step-00000001").mkdir(parents=True)
    (first / "checkpoint.json").touch()
    with pytest.raises(StageError, match="no checkpoint after step 2") as error:
        context.model("teacher@2")
    assert "choose among 1" in error.value.do
    (second := tmp_path / "teacher" / "checkpoints" / "step-00000002").mkdir()
    with pytest.raises(StageError, match="no checkpoint after step 2"):
        context.model("teacher@2")
    (second / "checkpoint.json").touch()
    found = context.model("teacher@2")
    assert (found.name, found.folder, found.step) == ("teacher@2", tmp_path / "teacher", 2)


def test_folders_are_given_by_path(context, tmp_path):
    folder = tmp_path / "elsewhere"
    (folder / "train").mkdir(parents=True)
    (folder / "tokenizer.json").touch()
    assert context.data(str(folder)) == folder
    found = context.model(str(folder))
    assert (found.folder, found.tokenizer) == (folder, folder)


def test_what_is_nowhere_is_refused(context, tmp_path, monkeypatch):
    def offline(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(StageError, match=r"model 'org/nothing' was not found: .*no network"):
        context.model("org/nothing")
    with pytest.raises(StageError, match="neither a stage of this recipe nor a folder"):
        context.data(str(tmp_path))


def test_deepspeed_json_beside_the_recipe_comes_first(context, tmp_path):
    assert context.deepspeed_json("student_zero3.json").parent.name == "ds_configs"
    (tmp_path / "student_zero3.json").write_text("{}")
    assert context.deepspeed_json("student_zero3.json") == tmp_path / "student_zero3.json"
    with pytest.raises(RecipeError, match=r"'other\.json'.*\n.*\n.*student_zero3\.json"):
        context.deepspeed_json("other.json")
    assert context_module.ResolvedModel("a", tmp_path, None, None).step is None


def test_the_tokenizer_of_a_stage_that_is_given_by_its_path(context, tmp_path):
    """As `model:`, `data:` and `scores:` take one."""
    for stage, inner in (("corpus", "tokenizer"), ("exported", "model")):
        (tmp_path / stage / inner).mkdir(parents=True)
        build = BuildData.model_validate(
            {"name": "more", "kind": "build_data", "sources": [{"embedded": "sotu"}], "sequence_length": 8,
             "tokenizer": str(tmp_path / stage)}
        )  # fmt: skip
        assert build_data._tokenizer(context, build) == tmp_path / stage / inner
    (tmp_path / "corpus" / "tokenizer.json").touch()
    own = build.model_copy(update={"tokenizer": str(tmp_path / "corpus")})
    assert build_data._tokenizer(context, own) == str(tmp_path / "corpus"), "a folder with files of its own"


@pytest.mark.parametrize("inner", ["", "tokenizer", "model"])
def test_a_stage_of_another_run_keeps_its_tokenizer(context, tmp_path, inner):
    """A prune stage and an export have it beside their weights; an export of theirs would have none."""
    other = tmp_path / "other"
    (other / "model").mkdir(parents=True)
    assert context.model(str(other)).tokenizer is None
    (other / inner).mkdir(exist_ok=True)
    (other / inner / "tokenizer.json").touch()
    assert context.model(str(other)).tokenizer == other / inner


@pytest.mark.parametrize("name", ["corpus", "teacher", "pruned"])
def test_a_finished_stages_tokenizer_is_compared_before_it_is_used(context, tmp_path, name):
    for each, place in (("corpus", "tokenizer"), ("teacher", "tokenizer"), ("pruned", "model")):
        (tmp_path / each / place).mkdir(parents=True)
        (tmp_path / each / place / "tokenizer.json").write_text("{}")
        (tmp_path / each / place / "chat_template.jinja").write_text("{}")
        write_checksums(tmp_path / each)
        finish(tmp_path / each)
    (tmp_path / "corpus" / "train").mkdir()
    use = context.data if name == "corpus" else context.model
    folder = tmp_path / name / ("model" if name == "pruned" else "tokenizer")
    assert use(name) and use(str(tmp_path / name))
    (folder / "chat_template.jinja").write_text("another")
    for text in (name, str(tmp_path / name)):
        with pytest.raises(StoreCorrupted, match=r"chat_template\.jinja has 7 bytes, but 2 were written"):
            use(text)
    shutil.rmtree(folder)
    for text in (name, str(tmp_path / name)):
        with pytest.raises(StoreCorrupted, match=r"chat_template\.jinja is missing"):
            use(text)


def test_the_tokenizer_of_another_runs_stage_is_compared_where_data_is_built_with_it(context, tmp_path):
    (tmp_path / "other" / "tokenizer").mkdir(parents=True)
    (tmp_path / "other" / "tokenizer" / "tokenizer.json").write_text("{}")
    write_checksums(tmp_path / "other")
    stage = context.recipe.stage("corpus").model_copy(update={"tokenizer": str(tmp_path / "other")})
    assert build_data._tokenizer(context, stage) == tmp_path / "other" / "tokenizer"
    (tmp_path / "other" / "tokenizer" / "tokenizer.json").write_text("[]")
    with pytest.raises(StoreCorrupted, match=r"tokenizer\.json is damaged"):
        build_data._tokenizer(context, stage)

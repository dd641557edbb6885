"""What may change between two starts of a stage, and how a change that may not is named."""

import shutil

import pytest

from minima.disk import write_json
from minima.errors import StageError
from minima.recipe.loading import load_recipe
from minima.stages.digests import former_source_digest, source_digest
from minima.stages.identity import changed_settings, check_run, check_unchanged, describe, differences
from minima.stages.manifest import read_manifest, write_manifest, write_started

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


def check_stage(run, name, *overrides):
    recipe = load_recipe(run / "x.yaml", overrides)
    check_unchanged(describe(recipe, recipe.stage(name), run), run / name, recipe)


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
    check_stage(run, "teacher")
    state = "finished" if finished else "half-finished"
    with pytest.raises(StageError, match=rf"'teacher' is {state} in .*learning_rate is 0.002 and was 0.001"):
        check_stage(run, "teacher", "stages.teacher.learning_rate=2e-3")


def test_a_refusal_names_what_has_to_be_made_again_with_the_stage(run):
    publish(run, "corpus")
    publish(run, "teacher")
    later = "stages.corpus.sequence_length=32"
    with pytest.raises(StageError, match=r"remove \S+corpus to make it again \(with what was made from it: teacher\),"):
        check_stage(run, "corpus", later)
    publish(run, "pruned")  # which reads both
    with pytest.raises(StageError, match=r"\(with what was made from it: teacher, pruned\),"):
        check_stage(run, "corpus", later)
    with pytest.raises(StageError, match=r"pruned to make it again, undo"):
        check_stage(run, "pruned", "stages.pruned.target.hidden_size=8")


def test_a_mistake_mended_before_anything_was_made_is_no_change(run):
    publish(run, "corpus")
    publish(run, "teacher", finished=False)
    check_stage(run, "teacher", "stages.teacher.learning_rate=2e-3")


@pytest.mark.parametrize(
    "override",
    [
        "log_every_steps=1",
        "keep_checkpoints=9",
        "micro_batch_sequences=2",
        "wandb_project=w",
        "deepspeed=other.json",
        "seed=776",
    ],
)
def test_what_does_not_change_the_result_may_change(run, override):
    publish(run, "corpus")
    publish(run, "teacher")
    check_stage(run, "teacher", f"stages.teacher.{override}")


def test_a_teacher_may_move_but_not_change(run):
    whole_run(run)
    distil = "{name: student, kind: distil, model: pruned, teacher: {source: teacher}, data: corpus, <<: *t}"
    (run / "x.yaml").write_text(f"{RECIPE}  - {distil}\n")
    before = description(run, "student")["identity"]
    for override, same in (("placement=replica", True), ("window_micro_batches=2", True), ("source=base", False)):
        now = description(run, "student", f"stages.student.teacher.{override}")["identity"]
        assert (now == before) is same


def test_the_micro_batch_of_a_prune_stage_may_not(run):
    publish(run, "corpus")
    publish(run, "teacher", finished=False)
    publish(run, "pruned")
    with pytest.raises(StageError, match="micro_batch_sequences"):
        check_stage(run, "pruned", "stages.pruned.micro_batch_sequences=2")


def test_a_changed_text_is_named_and_reaches_later_stages(run):
    publish(run, "corpus")
    publish(run, "teacher")
    (run / "text.jsonl").write_text('{"text": "b"}\n')
    with pytest.raises(StageError, match=r"its input sources.0 \(text.jsonl\) has changed"):
        check_stage(run, "corpus")
    (run / "corpus" / "manifest.json").unlink()
    (run / "corpus" / "started.json").unlink()
    publish(run, "corpus")
    with pytest.raises(StageError, match=r"its input data \(corpus\) has changed"):
        check_stage(run, "teacher")


@pytest.mark.parametrize(("name", "content"), [("model.safetensors", b"123456789"), ("config.json", b"[]")])
def test_a_changed_model_folder_is_named(run, name, content):
    publish(run, "corpus")
    publish(run, "teacher")
    (run / "base" / name).write_bytes(content)
    with pytest.raises(StageError, match=r"its input model \(base\) has changed"):
        check_stage(run, "teacher")


def test_changed_blocks_of_a_data_folder_given_by_path_are_named(run):
    (run / "copy" / "train").mkdir(parents=True)
    (run / "copy" / "train" / "index.json").write_text("[1]")
    recipe = load_recipe(run / "x.yaml", ["stages.teacher.data=copy"])
    (run / "teacher").mkdir()
    write_started(run / "teacher", describe(recipe, recipe.stage("teacher"), run))
    write_manifest(run / "teacher", {"loss": 1.5}, 2.0)
    check_unchanged(describe(recipe, recipe.stage("teacher"), run), run / "teacher", recipe)
    (run / "copy" / "train" / "index.json").write_text("[2]")
    with pytest.raises(StageError, match=r"its input data \(copy\) has changed"):
        check_unchanged(describe(recipe, recipe.stage("teacher"), run), run / "teacher", recipe)


def test_a_finished_stage_of_another_run_counts_by_its_identity(run):
    publish(run, "corpus")
    shutil.copytree(run / "corpus", run / "other")
    inputs = description(run, "teacher", "stages.teacher.data=./other")["inputs"]
    assert inputs["data (./other)"] == read_manifest(run / "other")["identity"]


def test_half_written_names_beside_started_are_no_content(run):
    publish(run, "corpus")
    publish(run, "teacher", finished=False)
    (run / "teacher" / ".started.json.4711").touch()  # another rank is writing, or was killed as it wrote
    check_stage(run, "teacher", "stages.teacher.learning_rate=2e-3")


def whole_run(run):
    for name in ("corpus", "teacher", "pruned"):
        publish(run, name)


def check(run, *overrides, names=("corpus", "teacher", "pruned")):
    recipe = load_recipe(run / "x.yaml", overrides)
    check_run(recipe, [recipe.stage(name) for name in names], run)


CHANGED = "stages.teacher.learning_rate=2e-3"


def test_a_finished_stage_stays_while_its_input_is_made_again_the_same(run):
    whole_run(run)
    shutil.rmtree(run / "teacher")
    check(run)
    shutil.rmtree(run / "corpus")
    check(run)
    check(run, "stages.teacher.log_every_steps=3")


@pytest.mark.parametrize("names", [("corpus", "teacher", "pruned"), ("teacher",)])
def test_a_finished_stage_whose_input_will_be_another_is_refused(run, names):
    whole_run(run)
    shutil.rmtree(run / "teacher")
    with pytest.raises(StageError, match=r"'pruned' is finished in .*its input model \(teacher@2\) has changed"):
        check(run, CHANGED, names=names)


def test_a_change_is_seen_through_stages_that_are_all_made_again(run):
    whole_run(run)
    shutil.rmtree(run / "teacher")
    shutil.rmtree(run / "corpus")
    (run / "text.jsonl").write_text('{"text": "b"}\n')
    with pytest.raises(StageError, match=r"'pruned' is finished in .*its input model \(teacher@2\) has changed"):
        check(run)


def test_a_first_try_that_left_nothing_says_nothing_of_the_next(run):
    whole_run(run)
    (run / "teacher" / "manifest.json").unlink()
    with pytest.raises(StageError, match="'pruned' is finished"):
        check(run, CHANGED)
    check(run)


def test_other_finished_stages_are_not_asked_for(run):
    whole_run(run)
    check(run, CHANGED, names=("corpus",))


def test_an_input_that_is_not_there_is_an_error_where_nothing_is_planned(run):
    with pytest.raises(StageError, match="stage 'corpus' is not finished"):
        description(run, "teacher")


def test_text_that_was_put_away_once_it_was_built_has_not_changed(run):
    publish(run, "corpus")
    (run / "text.jsonl").rename(run / "archived.jsonl")
    check_stage(run, "corpus")
    (run / "text.jsonl").write_text('{"text": "b"}\n')
    with pytest.raises(StageError, match=r"sources\.0 \(text\.jsonl\) has changed"):
        check_stage(run, "corpus")


def test_a_hash_that_an_earlier_version_took_of_the_same_files_still_holds(run):
    (run / "x.yaml").write_text(RECIPE.replace("text.jsonl", "'*text*'"))
    (run / ".text.swp").write_text("an editor's, which earlier versions counted and nobody read")
    publish(run, "corpus")
    source = load_recipe(run / "x.yaml").stage("corpus").sources[0]
    former = former_source_digest(source)
    key, manifest = "sources.0 (*text*)", read_manifest(run / "corpus")
    assert former not in (None, manifest["inputs"][key])
    write_json(run / "corpus" / "manifest.json", manifest | {"inputs": {key: former}})
    assert description(run, "corpus")["inputs"][key] == former
    (run / "text.jsonl").write_text('{"text": "b"}\n')
    assert description(run, "corpus")["inputs"][key] == source_digest(source) != former


def test_text_that_is_gone_before_it_was_built_is_no_input(run):
    publish(run, "corpus", finished=False)
    (run / "corpus" / "train").mkdir()
    (run / "text.jsonl").unlink()
    with pytest.raises(StageError, match="has changed"):
        check_stage(run, "corpus")


def test_what_a_chosen_stage_reads_has_to_be_what_the_recipe_says(run):
    """Or its model card would tell of settings that nothing was made with."""
    publish(run, "corpus")
    publish(run, "teacher")
    (run / "text.jsonl").unlink()  # not looked at: it may have stayed on another machine
    for override, refused in (
        ("stages.teacher.learning_rate=2e-3", r"'teacher' is finished in .*learning_rate is 0.002 and was 0.001"),
        ("stages.corpus.sequence_length=32", r"'corpus' is finished in .*sequence_length is 32 and was 64"),
        ("stages.teacher.log_every_steps=1", None),
        ("stages.pruned.target.hidden_size=8", None),
    ):
        recipe = load_recipe(run / "x.yaml", [override])
        if refused is None:
            check_run(recipe, [recipe.stage("pruned")], run)
            continue
        with pytest.raises(StageError, match=refused):
            check_run(recipe, [recipe.stage("pruned")], run)


def test_what_is_read_through_other_stages_has_to_be_what_the_recipe_says_too(run):
    whole_run(run)
    (run / "x.yaml").write_text(RECIPE + "  - {name: release, kind: export, model: pruned}\n")
    check(run, names=("release",))
    with pytest.raises(StageError, match=r"'teacher' is finished in .*learning_rate is 0.002 and was 0.001"):
        check(run, CHANGED, names=("release",))


def test_a_key_of_another_version_is_no_change(run):
    publish(run, "corpus")
    publish(run, "teacher")
    path = run / "teacher" / "manifest.json"
    content = read_manifest(run / "teacher")
    del content["stage"]["log_every_steps"], content["stage"]["seed"]
    write_json(path, content)
    recipe = load_recipe(run / "x.yaml")
    assert changed_settings(recipe.stage("teacher"), run / "teacher") == []
    write_json(path, content | {"stage": content["stage"] | {"gone": 1}})
    assert changed_settings(recipe.stage("teacher"), run / "teacher") == []
    write_json(path, content | {"stage": content["stage"] | {"kind": "distil"}})
    assert changed_settings(recipe.stage("teacher"), run / "teacher") == ['kind is "adapt" and was "distil"']


def test_of_a_long_value_only_what_differs_is_told():
    sources = [{"path": "a" * 150, "weight": 1.0}, {"path": "b", "weight": 2.0}]
    other = [sources[0], sources[1] | {"weight": 3.0}]
    assert differences(sources, other, "sources") == ["sources.1.weight is 3.0 and was 2.0"]
    gone = 'sources has 1 entries and had 2; gone: {"path": "b", "weight": 2.0}'
    assert differences(sources, sources[:1], "sources") == [gone]
    added = [*sources, {"name": None, "path": "c"}]
    assert differences(sources, added, "sources") == ['sources has 3 entries and had 2; new: {"path": "c"}']
    assert differences({"a": {"b": 1}}, {"a": {"b": 1, "c": [2]}}) == ["a.c is [2] and was null"]


@pytest.mark.parametrize("key", ["evaluate_every_steps=4", "evaluate_sequences=8"])
def test_what_decides_when_a_run_ends_early_may_not_change(run, key):
    publish(run, "corpus")
    often, patient = "stages.teacher.evaluate_every_steps=2", "stages.teacher.patience=3"
    for overrides, same in (([often], True), ([often, patient], False)):
        before, now = (description(run, "teacher", *overrides, *more) for more in ([], [f"stages.teacher.{key}"]))
        assert (before["identity"] == now["identity"]) is same


FILES = """
name: x
stages:
  - {name: corpus, kind: build_data, sources: [{path: text.jsonl}], tokenizer: tok, sequence_length: 64,
     format: conversations, chat_template: own.jinja}
  - {name: scores, kind: benchmark, model: base, suite: minima, task_folder: tasks, data_folder: items,
     answers: [{format: mt_bench, questions: questions.jsonl}]}
"""


@pytest.mark.parametrize(
    ("name", "file"),
    [("corpus", "own.jinja"), ("scores", "tasks/own.yaml"), ("scores", "items/a.jsonl"), ("scores", "questions.jsonl")],
)
def test_what_lies_in_the_files_that_a_stage_reads_beside_its_inputs_counts(run, name, file):
    (run / "x.yaml").write_text(FILES)
    for each in ("own.jinja", "tasks/own.yaml", "items/a.jsonl", "questions.jsonl"):
        (run / each).parent.mkdir(exist_ok=True)
        (run / each).write_text("one")
    before = description(run, name)
    assert description(run, name) == before
    (run / file).write_text("two")
    assert description(run, name)["identity"] != before["identity"]

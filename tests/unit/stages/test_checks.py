"""What is refused before anything starts."""

import re
from pathlib import Path

import pytest

from minima.errors import DeepSpeedConfigError, RecipeError, StageError
from minima.recipe.references import references
from minima.recipe.schema import Recipe
from minima.stages.driver import checks

PUBLISH = {"name": "push", "kind": "publish", "model": "some/model", "repo": "somebody/model"}
BENCHMARK = {"name": "scores", "kind": "benchmark", "model": "some/model", "tasks": ["minima_continuation"]}

DISTIL = {
    "name": "student", "kind": "distil", "model": "some/model", "data": "data", "batch_sequences": 2,
    "micro_batch_sequences": 1, "steps": 1, "learning_rate": 1e-3, "teacher": "some/teacher",
}  # fmt: skip


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """What the Hub was asked for; it has all of it."""
    found = []
    monkeypatch.setattr(checks, "check_there", lambda name, revision, *given: found.append((name, revision)))
    return found


def check(stage, tmp_path):
    recipe = Recipe(name="test", stages=[stage], launcher="local")
    return checks.check_stages(recipe, Path("test.yaml"), recipe.stages, tmp_path, ranks=1)


def test_a_push_without_a_token(tmp_path, monkeypatch):
    publish = PUBLISH | {"model": str(tmp_path)}
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(RecipeError, match="no token for the Hub"):
        check(publish, tmp_path)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "a token")
    check(publish, tmp_path)
    with pytest.raises(StageError, match="'some/model' is neither a stage of this recipe nor a folder on this machine"):
        check(PUBLISH, tmp_path)  # what is on the Hub is there already


def test_the_hub_is_asked_only_for_what_will_be_read_and_is_not_here(tmp_path, asked):
    data = {"data": str(tmp_path)}
    check(DISTIL | data | {"soft_weight": 0.0, "hard_weight": 1.0}, tmp_path)
    assert asked == [("some/model", None)], "a teacher that weighs nothing is not opened"
    asked.clear()
    (tmp_path / "here").mkdir()
    check(DISTIL | data | {"model": str(tmp_path / "here"), "teacher": str(tmp_path / "student" / "later")}, tmp_path)
    assert asked == []
    recipe = Recipe(name="test", stages=[DISTIL | data], launcher="local")
    checks.check_stages(recipe, Path("test.yaml"), recipe.stages, tmp_path, ranks=1, elsewhere=True)
    assert asked == [], "its jobs will have what `minima fetch` has brought"


def test_a_benchmark_without_its_harness(tmp_path, monkeypatch):
    check(BENCHMARK, tmp_path)
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install lm-eval accelerate"):
        check(BENCHMARK, tmp_path)


def test_fused_kernels_without_what_they_need(tmp_path, monkeypatch):
    stage = DISTIL | {"data": str(tmp_path), "kernels": "liger"}
    monkeypatch.setattr(checks, "num_accelerators", lambda: 1)
    monkeypatch.setattr(checks, "find_spec", lambda name: object())
    check(stage, tmp_path)
    monkeypatch.setattr(checks, "num_accelerators", lambda: 0)
    with pytest.raises(RecipeError, match=r"stages\.student: kernels: liger, but there is no GPU"):
        check(stage, tmp_path)
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="pip install liger-kernel"):
        check(stage, tmp_path)


@pytest.mark.parametrize(
    ("launcher", "host_file", "where"),
    [
        ("local", False, {"elsewhere": True}),
        ("local", False, {"ranks_elsewhere": True}),
        ("deepspeed", True, {}),
        ("mpirun", True, {}),
        ("srun", False, {}),
    ],
)
def test_what_the_machines_of_the_ranks_have_is_not_judged_by_this_one(
    tmp_path, monkeypatch, launcher, host_file, where
):
    monkeypatch.setattr(checks, "find_launcher", lambda *given: None)
    monkeypatch.setattr(checks, "num_accelerators", lambda: 0)
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    monkeypatch.setattr(checks, "has_host_file", lambda: host_file)
    stage = DISTIL | {"data": str(tmp_path), "kernels": "liger"}
    recipe = Recipe(name="test", stages=[stage], launcher=launcher)
    checks.check_stages(recipe, Path("test.yaml"), recipe.stages, tmp_path, 1, **where)


def test_a_teacher_that_these_ranks_cannot_share(tmp_path, monkeypatch):
    corpus = {"name": "corpus", "kind": "build_data", "sources": [{"embedded": "sotu"}], "sequence_length": 64,
              "tokenizer": "some/model"}  # fmt: skip
    shape = {"vocabulary_size": 64, "hidden_size": 16, "intermediate_size": 8, "num_layers": 1, "num_heads": 4}
    teacher = {"random": shape | {"num_key_value_heads": 2}, "placement": "tensor_parallel"}
    student = DISTIL | {"data": "corpus", "model": {"random": shape}, "teacher": teacher, "batch_sequences": 4}

    def check_on(ranks: int, **keys) -> None:
        recipe = Recipe(name="test", stages=[corpus, student], ranks=ranks, launcher="torchrun")
        checks.check_stages(recipe, Path("test.yaml"), recipe.stages, tmp_path, ranks, **keys)

    monkeypatch.setattr(checks, "num_accelerators", lambda: 0)
    check_on(2)
    for ranks, why in ((1, "a single rank has no other"), (4, "2 key-value heads are not divisible by 4")):
        with pytest.raises(RecipeError, match=rf"stages\.student\.teacher: .* on {ranks} ranks? of a machine: {why}"):
            check_on(ranks)
        check_on(ranks, elsewhere=True)


def test_a_teachers_json_is_checked_for_its_own_placement(tmp_path):
    def with_teacher(placement: str, file: str, offload: str = "none"):
        teacher = {"source": "some/teacher", "placement": placement, "offload": offload, "deepspeed": file}
        check(
            DISTIL
            | {"data": str(tmp_path)}
            | {"teacher": teacher | ({"nvme_path": "/x"} if offload == "nvme" else {})},
            tmp_path,
        )

    with_teacher("replica", "teacher_replica.json")
    with_teacher("tensor_parallel", "teacher_tensor_parallel.json")
    with_teacher("zero3_node", "teacher_nvme.json", "nvme")
    with pytest.raises(DeepSpeedConfigError, match="stage to 0"):
        with_teacher("replica", "teacher_zero3.json")


def test_a_folder_that_is_not_there(tmp_path):
    for field, text in (
        ("data", "corpus"),
        ("data", "runs/other/corpus"),
        ("model", "./base"),
        ("teacher", "/no/base"),
    ):
        with pytest.raises(StageError, match=rf"stages.student.{field}: '{text}' is .*a folder on this machine"):
            check(DISTIL | {"data": str(tmp_path), field: text}, tmp_path)


def test_a_folder_that_another_run_will_have_made(tmp_path):
    recipe = Recipe(name="test", stages=[DISTIL | {"data": str(tmp_path / "other" / "corpus")}], launcher="local")
    checks.check_stages(recipe, Path("x.yaml"), recipe.stages, tmp_path, 1, to_come=[tmp_path / "other"])


def test_a_folder_of_an_earlier_stage_of_the_same_run(tmp_path):
    check(DISTIL | {"data": str(tmp_path / "corpus"), "model": str(tmp_path / "pruned")}, tmp_path)


def test_all_that_an_unfinished_input_reads_is_named(tmp_path):
    """Not only the input: who adds it would meet the next refusal."""
    corpus = {"name": "corpus", "kind": "build_data", "sources": [{"embedded": "sotu"}], "sequence_length": 64,
              "tokenizer": "some/model"}  # fmt: skip
    first = DISTIL | {"name": "first", "data": "corpus"}
    recipe = Recipe(name="test", stages=[corpus, first, DISTIL | {"model": "first", "data": "corpus"}])
    with pytest.raises(StageError, match="add it: --stages corpus,first,student"):
        checks.check_stages(recipe, Path("x.yaml"), recipe.stages[2:], tmp_path, 1)


READER = {"name": "quality", "kind": "evaluate", "models": ["student@4"], "data": "data"}
STUDENT = DISTIL | {"steps": 10, "checkpoint_every_steps": 2}


@pytest.mark.parametrize(
    ("chosen", "finished", "there", "do"),
    [
        ("student,quality", False, [], None),
        ("student,quality", False, [2], None),
        ("student,quality", False, [4, 6], None),
        ("student,quality", False, [6, 8], "choose among 6, 8, or remove .*student to train it again"),
        ("student,quality", True, [8, 10], "choose among 8, 10, or remove .*student to train it again"),
        ("student,quality", True, [], "remove .*student to train it again"),
        ("student", False, [6, 8], None),
        ("quality", False, [], "add it: --stages student,quality"),
        ("quality", False, [4], None),
    ],
)
def test_a_checkpoint_that_no_training_will_leave(tmp_path, monkeypatch, chosen, finished, there, do):
    monkeypatch.setattr(checks, "check_run", lambda *given: None)
    student = STUDENT | {"data": str(tmp_path)}
    recipe = Recipe(name="test", stages=[student, READER | {"data": str(tmp_path)}], launcher="local")
    for step in there:
        checkpoint = tmp_path / "student" / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "checkpoint.json").write_text("{}")
    if finished:
        (tmp_path / "student").mkdir(exist_ok=True)
        (tmp_path / "student" / "manifest.json").write_text("{}")
    recipe = recipe.model_copy(update={"output": str(tmp_path)})
    stages = [recipe.stage(name) for name in chosen.split(",")]
    if do is None:
        checks.check_stages(recipe, Path("x.yaml"), stages, tmp_path, 1)
        return
    with pytest.raises(StageError, match=r"'quality' reads 'student@4', but .*no checkpoint after step 4") as error:
        checks.check_stages(recipe, Path("x.yaml"), stages, tmp_path, 1)
    assert re.match(do, error.value.do)


def test_a_step_after_the_best_one_is_not_had_by_training_again(tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "manifest.json").write_text("{}")
    student = STUDENT | {"data": str(tmp_path), "patience": 1, "evaluate_every_steps": 2}
    recipe = Recipe(name="test", stages=[student, READER | {"data": str(tmp_path)}], output=str(tmp_path))
    reference = next(found for found in references(recipe, recipe.stage("quality")) if found.step == 4)
    with pytest.raises(StageError) as error:
        checks._check_checkpoint(recipe, "quality", reference, recipe.stage("student"), tmp_path, True)
    assert "remove `patience`" in error.value.do and "are kept" not in error.value.do


def test_a_finished_stage_no_longer_needs_the_checkpoint_that_it_read(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "check_run", lambda *given: None)
    stages = [STUDENT | {"data": str(tmp_path)}, READER | {"data": str(tmp_path)}]
    recipe = Recipe(name="test", stages=stages, launcher="local", output=str(tmp_path))
    for name in ("student", "quality"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    checks.check_stages(recipe, Path("x.yaml"), recipe.stages, tmp_path, 1)


def test_a_folder_that_only_the_nodes_see(tmp_path):
    recipe = Recipe(name="test", stages=[DISTIL | {"data": "/data/corpus"}], launcher="local")
    said = checks.check_stages(recipe, Path("x.yaml"), recipe.stages, tmp_path, 1, elsewhere=True)
    assert "stages.student: /data/corpus (data) is not on this machine" in said


def test_what_may_come_from_the_hub_is_a_warning(tmp_path, asked):
    warnings = check(DISTIL | {"data": str(tmp_path)}, tmp_path)
    assert asked == [("some/model", None), ("some/teacher", None)]
    assert warnings == [
        "stages.student: some/model (model) is not on this machine",
        "stages.student: some/teacher (teacher) is not on this machine",
    ]

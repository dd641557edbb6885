"""The recipe's teacher: where its weights live, what does not go together, and what may change between two starts."""

import pytest
from pydantic import ValidationError

from minima.disk import write_json
from minima.recipe.distillation import PLACING, Distil, Teacher
from minima.recipe.schema import Recipe
from minima.stages.identity import check_unchanged, describe
from minima.stages.manifest import STARTED

STAGE = {
    "name": "student", "kind": "distil", "model": {"random": {"vocabulary_size": 8, "hidden_size": 8,
    "intermediate_size": 8, "num_layers": 1, "num_heads": 1}}, "data": "data", "batch_sequences": 8,
    "micro_batch_sequences": 1, "steps": 1, "learning_rate": 1e-3,
}  # fmt: skip


def distil(**teacher) -> Distil:
    return Distil(**STAGE, teacher={"source": "big"} | teacher)


def test_a_plain_name_is_a_teacher_whose_place_is_chosen():
    stage = Distil(**STAGE, teacher="big")
    assert stage.teacher == Teacher(source="big")
    assert (stage.teacher.placement, stage.teacher.offload, stage.teacher.window_micro_batches) == (
        "auto",
        "none",
        None,
    )


@pytest.mark.parametrize(
    ("teacher", "what"),
    [
        ({"placement": "replica", "offload": "cpu"}, "placement replica and offload cpu"),
        ({"placement": "tensor_parallel", "offload": "nvme", "nvme_path": "/x"}, "tensor_parallel and offload nvme"),
        ({"offload": "cpu"}, "placement auto and offload cpu"),
        ({"placement": "zero3", "offload": "nvme"}, "no nvme_path"),
        ({"placement": "zero3", "nvme_path": "/x"}, "offload none"),
        ({"placement": "zero3", "tensor_parallel_ranks": 2}, "placement zero3"),
        ({"deepspeed": "mine.json"}, "placement auto"),
    ],
)
def test_what_would_not_be_used_is_refused(teacher, what):
    with pytest.raises(ValidationError, match=what):
        distil(**teacher)


@pytest.mark.parametrize(
    ("change", "may"),
    [
        ({"placement": "zero3"}, True),
        ({"placement": "zero3", "offload": "cpu"}, True),
        ({"window_micro_batches": 4}, True),
        ({"placement": "tensor_parallel", "tensor_parallel_ranks": 2}, True),
        ({"placement": "zero3", "deepspeed": "mine.json"}, True),
        ({"precision": "float32"}, False),
        ({"revision": "main"}, False),
    ],
)
def test_a_run_may_go_on_with_its_teacher_elsewhere_but_not_with_another(tmp_path, change, may):
    def description(**teacher):
        recipe = recipe_of(teacher)
        return describe(recipe, recipe.stages[0], tmp_path)

    def recipe_of(teacher):
        return Recipe(name="x", stages=[distil(**teacher).model_dump(exclude_unset=True)])

    (tmp_path / "student").mkdir()
    write_json(tmp_path / "student" / STARTED, description())
    (tmp_path / "student" / "checkpoints").mkdir()
    after = description(**change)
    assert (after["identity"] == description()["identity"]) == may
    if may:
        check_unchanged(after, tmp_path / "student", recipe_of(change))


def test_all_that_places_a_teacher_is_known_as_such():
    assert set(Teacher.model_fields) - PLACING == {"source", "revision", "random", "shape", "precision"}

"""A study as ordinary runs: which cells there are, and what each run reads."""

from pathlib import Path

import pytest

from minima.errors import RecipeError
from minima.law.study.grid import DATA, TEACHERS, expand
from minima.law.study.recipe import load_study, warnings
from minima.recipe.loading import load_recipe, resolved_yaml
from tests.unit.law.study_grid import GRID, TRAINING, study_file, study_of


@pytest.fixture
def units(tmp_path):
    return {unit.name: unit for unit in study_of(tmp_path)[1]}


def test_no_student_that_is_not_smaller_than_its_teacher(units):
    pairs = {(unit.cell.student, unit.cell.teacher) for unit in units.values() if unit.cell}
    assert pairs == {("a", "small"), ("a", "large"), ("b", "large"), ("a", None), ("b", None)}


def test_every_cell_comes_once_for_each_seed_and_start(units):
    # 3 pairs x 3 starts with a teacher, and 2 students alone; x 2 seeds
    assert sum(unit.cell is not None for unit in units.values()) == (3 * 3 + 2) * 2


def test_teachers_are_trained_with_every_seed_and_shared(units):
    teachers = {unit.teacher for unit in units.values() if unit.teacher}
    assert teachers == {("small", 1), ("small", 2), ("large", 1), ("large", 2)}
    for unit in units.values():
        if unit.cell and unit.cell.teacher:
            assert f"{TEACHERS}/{unit.cell.teacher}-seed{unit.cell.seed}" in unit.needs
            assert unit.recipe.stage("student").seed == unit.cell.seed
        if unit.teacher:
            assert {stage.seed for stage in unit.recipe.stages if stage.kind != "evaluate"} == {unit.teacher[1]}


def test_a_cell_reads_teacher_data_and_scores_by_their_paths(units, tmp_path):
    cell = units["cells/a-small-pruned_from_fixed-163840-seed2"]
    pruned, student, quality = cell.recipe.stages
    assert pruned.model.source == str(tmp_path / "runs/teachers/large-seed2/teacher")
    assert pruned.scores == str(tmp_path / "runs/teachers/large-seed2/scores")
    assert student.model.source == "pruned" and student.tokens == 163_840
    assert student.teacher.source == quality.teacher == str(tmp_path / "runs/teachers/small-seed2/teacher")
    assert student.hard_weight == 0.3 and student.data == str(tmp_path / "runs/data/corpus/corpus")
    assert cell.needs == (f"{DATA}/corpus", "teachers/large-seed2", "teachers/small-seed2")


def test_the_starts(units):
    random = units["cells/a-small-random-163840-seed1"].recipe
    assert [stage.kind for stage in random.stages] == ["distil", "evaluate"]
    assert random.stages[0].model.random.hidden_size == 16
    direct = units["cells/a-direct-163840-seed1"].recipe
    assert [stage.kind for stage in direct.stages] == ["adapt", "evaluate"] and direct.stages[1].teacher is None
    own = units["cells/a-small-pruned_from_teacher-163840-seed1"].recipe
    assert "small-seed1" in own.stages[0].model.source


def test_a_member_has_training_of_its_own(units, tmp_path):
    rates = {unit.teacher[0]: unit.recipe.stages[0].learning_rate for unit in units.values() if unit.teacher}
    assert rates == {"small": 1e-2, "large": 5e-3}
    own = {name: dict(shape) for name, shape in GRID["students"].items()}
    own["b"]["training"] = {"learning_rate": 2e-3}
    cells = [unit for unit in study_of(tmp_path, students=own)[1] if unit.cell]
    rates = {(unit.cell.student, unit.recipe.stage("student").learning_rate) for unit in cells}
    assert rates == {("a", 1e-2), ("b", 2e-3)}


def test_scores_are_measured_only_where_something_is_cut(tmp_path):
    _, units = study_of(tmp_path, initialisations=["pruned_from_fixed"])
    kinds = {unit.teacher[0]: [stage.kind for stage in unit.recipe.stages] for unit in units if unit.teacher}
    assert kinds == {"small": ["adapt", "evaluate"], "large": ["adapt", "prune", "evaluate"]}


def test_a_run_is_a_recipe_that_minima_run_takes(units, tmp_path):
    for number, unit in enumerate(units.values()):
        path = tmp_path / f"{number}.yaml"
        path.write_text(resolved_yaml(unit.recipe))
        assert load_recipe(path) == unit.recipe


def test_flops_of_a_cell_count_the_teacher(units):
    cell = units["cells/a-small-random-163840-seed1"]
    alone = units["cells/a-direct-163840-seed1"]
    shape = units["teachers/small-seed1"].recipe.stages[0].model.random
    assert cell.flops - alone.flops == pytest.approx(shape.forward_flops_per_token(32) * 163_840)


def test_settings_that_no_stage_takes_are_refused_with_their_place(tmp_path):
    path = study_file(tmp_path, student_training=TRAINING | {"learning_rat": 1.0})
    with pytest.raises(RecipeError, match=r"student\.learning_rat: no such key; did you mean 'learning_rate'"):
        expand(load_study(path), path)


def test_an_empty_grid_is_refused(tmp_path):
    b = {"hidden_size": 32, "num_heads": 4, "intermediate_size": 40}  # larger than the one teacher it would be cut from
    path = study_file(tmp_path, initialisations=["pruned_from_fixed"], fixed_teacher="small", students={"b": b})
    with pytest.raises(RecipeError, match="the grid is empty"):
        expand(load_study(path), path)


@pytest.mark.parametrize("name", ["law-small", "law-cpu"])
def test_the_shipped_studies_have_tokens_enough_in_every_cell(name, root: Path):
    path = root / "recipes" / f"{name}.yaml"
    study = load_study(path)
    assert study.name == name and warnings(study) == []
    for unit in expand(study, path):
        if unit.cell:
            assert unit.cell.tokens >= 10 * study.shape_of(unit.cell.student).non_embedding_parameters

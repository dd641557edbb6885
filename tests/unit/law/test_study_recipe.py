"""What a study's YAML may say, and what is refused by name."""

import pytest

from minima.errors import RecipeError
from minima.law.study.recipe import load_study, resolved_yaml, warnings
from tests.unit.law.study_grid import GRID, TRAINING, study_file

HUGE = {"hidden_size": 96, "num_heads": 12, "intermediate_size": 256}


def refused(folder, **changes) -> str:
    with pytest.raises(RecipeError) as caught:
        load_study(study_file(folder, **changes))
    return str(caught.value)


def test_a_study_loads_again_from_what_it_writes(tmp_path):
    study = load_study(study_file(tmp_path))
    (tmp_path / "again.yaml").write_text(resolved_yaml(study))
    assert load_study(tmp_path / "again.yaml") == study


def test_an_override_changes_it(tmp_path):
    study = load_study(study_file(tmp_path), ["seeds=[7]", "teachers.small.intermediate_size=64"])
    assert study.seeds == [7] and study.shape_of("small").intermediate_size == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"students": {"a": HUGE}}, "a (221,664 parameters without embeddings) is not smaller than any teacher"),
        ({"students": {}}, "students"),
        ({"seeds": [1, 1]}, r"seeds [1, 1] has a duplicate"),
        ({"teachers": GRID["teachers"] | {"a": HUGE}}, "'a' is a teacher and a student"),
        ({"fixed_teacher": "larg"}, "did you mean 'large'"),
        ({"fixed_teacher": None}, "fixed_teacher None"),
        ({"tokens": [31]}, "tokens 31 are less than one block of 32"),
        ({"tokens": [163_840, 163_871]}, "tokens 163,840 and 163,871 are the same 5,120 blocks of 32"),
        ({"teachers": {"large": HUGE | {"vocabulary_size": 600}}}, "large has a vocabulary of 600"),
        ({"shape": GRID["shape"] | {"vocabulary_size": 400}}, "small has a vocabulary of 400, but the study's is 512"),
        ({"teachers": {"a-b": HUGE}}, "teachers.a-b: must be letters, digits, '_' and '.', the first one a letter"),
        ({"seeds": ["one"]}, "seeds.0: must be a whole number, not 'one'"),
        ({"shape": GRID["shape"] | {"widht": 8}}, "widht: no such key"),
        ({"tockens": [1]}, "tockens: no such key; did you mean 'tokens'"),
        ({"initialisations": ["pruned"]}, "initialisations.0"),
        ({"student_training": TRAINING | {"tokens": 5}}, "student_training.tokens is given"),
        ({"teacher_training": TRAINING | {"seed": 5, "steps": 2}}, "teacher_training.seed is given"),
        ({"students": {"a": {"hidden_size": 15, "num_heads": 2, "intermediate_size": 8}}}, "students.a"),
    ],
)  # fmt: skip
def test_refused_by_name(tmp_path, changes, message):
    assert message in refused(tmp_path, **changes)


def test_budgets_of_different_blocks_are_taken(tmp_path):
    assert load_study(study_file(tmp_path, tokens=[32, 64, 163_871])).tokens == [32, 64, 163_871]


def test_the_recipe_of_a_run_is_called_one(root):
    with pytest.raises(RecipeError, match=r"quickstart\.yaml is the recipe of a run") as caught:
        load_study(root / "recipes" / "quickstart.yaml")
    assert caught.value.do.startswith("minima run ")


def test_a_student_that_cannot_be_cut_from_its_teacher_is_refused(tmp_path):
    wide = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 48}  # more neurons than the small teacher has
    said = refused(tmp_path, students={"a": wide})
    assert "the student a cannot be cut from the teacher small: a target with intermediate_size 48" in said
    heads = {"hidden_size": 16, "num_heads": 4, "intermediate_size": 16}  # heads of 4, and the teacher's are of 8
    assert "cannot be cut from the teacher" in refused(tmp_path, students={"a": heads})
    load_study(study_file(tmp_path, students={"a": wide}, initialisations=["random", "direct"]))


def test_what_makes_a_study_weak_is_said(tmp_path):
    assert warnings(load_study(study_file(tmp_path, teachers=GRID["teachers"] | {"huge": HUGE}))) == []
    said = "\n".join(warnings(load_study(study_file(tmp_path, tokens=[60_000], seeds=[1]))))
    assert "b is trained on 60,000 tokens, 3.7 for each of its 16,032 parameters" in said
    assert "one seed" in said and "2 teachers" in said

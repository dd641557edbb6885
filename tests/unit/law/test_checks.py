"""What is refused, and what is left out by name: nothing is fitted over silently."""

import math
import re
from dataclasses import replace

import pytest

from minima.errors import TableError
from minima.law.fit.checks import check_rows
from minima.law.fit.fitting import fit_table
from minima.law.table import write_table
from tests.law_tables import row, valley

STUDENTS, TEACHERS = (100e6, 200e6), (300e6, 600e6, 1200e6)


def table(**changes):
    return valley(STUDENTS, TEACHERS, 2, lambda size: 3 * size, direct=True, **changes)


def with_row(index, **changes):
    rows = table()
    rows[index] = replace(rows[index], **changes)
    return rows


def test_a_good_table_is_taken_whole():
    runs, excluded = check_rows(table(), "non_embedding")
    assert len(runs) == 2 * 2 * 4
    assert not excluded
    assert {run.student_size for run in runs} == set(STUDENTS)
    assert {run.student_size for run in check_rows(table(), "all")[0]} == {size + 1e6 for size in STUDENTS}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"student_loss": None}, "student_loss is missing"),
        ({"student_loss": math.nan}, "student_loss is nan"),
        ({"student_loss": math.inf}, "student_loss is inf"),
        ({"student_loss": -1.0}, "student_loss is -1.0"),
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": 0}, "tokens is 0"),
        ({"seed": None}, "seed is missing"),
        ({"initialisation": ""}, "initialisation is missing"),
        ({"initialisation": "direct"}, "direct means no teacher, but t600M is named"),
        ({"teacher": "", "teacher_parameters": None, "teacher_non_embedding_parameters": None}, "teacher is missing"),
        (
            {"teacher": "t90M", "teacher_parameters": 91_000_000, "teacher_non_embedding_parameters": 90_000_000},
            r"the student \(100,000,000 parameters\) is not smaller than its teacher \(90,000,000\)",
        ),
        (
            {"teacher": "t100M", "teacher_parameters": 101_000_000, "teacher_non_embedding_parameters": 100_000_000},
            "the student .* is not smaller than its teacher",
        ),
    ],
)
def test_a_row_at_fault_is_left_out_by_name(changes, reason):
    runs, excluded = check_rows(with_row(1, **changes), "non_embedding")
    assert len(runs) == 15
    assert [one.row for one in excluded] == [2]
    assert re.match(reason, excluded[0].reason)


def test_a_repeated_row_counts_once_and_a_contradiction_is_refused():
    rows = table()
    runs, excluded = check_rows([*rows, rows[0]], "non_embedding")
    assert len(runs) == 16
    assert excluded[0].reason == "it repeats row 1"
    with pytest.raises(TableError, match="rows 1 and 17 are the same run"):
        check_rows([*rows, replace(rows[0], student_loss=9.0)], "non_embedding")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_non_embedding_parameters": None}, "mixed: student_non_embedding_parameters is missing in row 2"),
        ({"teacher_non_embedding_parameters": None}, "mixed: teacher_non_embedding_parameters is missing in row 2"),
        ({"teacher_parameters": None}, "mixed: teacher_parameters is missing in row 2"),
        ({"student_parameters": 100_000_000}, "mixed: student_parameters excludes embeddings in row 2"),
        (
            {"student_parameters": 99_000_000},
            "student_parameters is less than student_non_embedding_parameters in row 2",
        ),
        ({"teacher_parameters": 10}, "teacher_parameters is less than teacher_non_embedding_parameters in row 2"),
        ({"student_parameters": 150_000_000}, "two sizes of the student s100M"),
        ({"teacher_parameters": 700_000_000}, "two sizes of the teacher t600M"),
        ({"vocabulary_size": 5}, "two vocabularies in the family llama"),
    ],
)
def test_what_makes_every_fit_wrong_is_refused(changes, message):
    with pytest.raises(TableError, match=message):
        check_rows(with_row(1, **changes), "non_embedding")


def test_sizes_that_no_row_has_can_be_left_for_the_other_kind():
    rows = [
        replace(one, student_non_embedding_parameters=None, teacher_non_embedding_parameters=None) for one in table()
    ]
    with pytest.raises(TableError, match="student_non_embedding_parameters is given in no row"):
        check_rows(rows, "non_embedding")
    assert len(check_rows(rows, "all")[0]) == 16


def test_a_single_teacher_is_refused():
    with pytest.raises(TableError, match="a single teacher, t300M"):
        check_rows(valley(STUDENTS, TEACHERS[:1], 2, lambda size: size), "non_embedding")


def test_a_table_without_a_run_that_can_be_fitted_is_refused():
    with pytest.raises(TableError, match=r"no distilled run can be fitted .*row 1: student_loss is missing"):
        check_rows([replace(one, student_loss=None) for one in table()], "non_embedding")
    with pytest.raises(TableError, match="no row has a teacher"):
        check_rows([row(1e6, None, 0, 3.0)], "non_embedding")


def test_what_the_grid_lacks_is_said(tmp_path):
    rows = [one for one in table() if not (one.teacher == "t600M" and one.student == "s100M" and one.seed == 1)]
    rows = [one for one in rows if not (one.teacher == "t1200M" and one.student == "s200M")]
    write_table(rows, tmp_path / "table.csv")
    notes = " ".join(fit_table(tmp_path / "table.csv", num_draws=50).notes)
    assert "student s100M: no run with teacher t600M for seed 1" in notes
    assert "student s200M: no run with teacher t1200M, which other students or starts have" in notes
    write_table([one for one in table() if one.seed == 1], tmp_path / "table.csv")
    assert "a single seed (1), so there are no intervals" in " ".join(fit_table(tmp_path / "table.csv").notes)


def test_budgets_that_are_the_same_to_two_digits_are_not_lost(tmp_path):
    """Two budgets 1 % apart: two conditions by tokens, and refused by tokens per parameter."""
    write_table(table() + [
        replace(one, tokens=1_010_000_000, unique_tokens=1_010_000_000) for one in table()
    ], tmp_path / "table.csv")  # fmt: skip
    fit = fit_table(tmp_path / "table.csv", num_draws=50, descents=1)
    assert [one.condition.budget for one in fit.conditions] == [1e9, 1.01e9]
    assert all(len(curve.direct) == 2 for one in fit.conditions for curve in one.curves)
    with pytest.raises(TableError, match="two runs with the same teacher and seed"):
        fit_table(tmp_path / "table.csv", budget="ratio", num_draws=50, descents=1)


def test_students_of_equal_tokens_per_parameter_can_share_a_line(tmp_path):
    """Tokens in proportion to size: no two students share a budget, all of them a ratio."""
    rows = []
    for size in (100e6, 200e6, 400e6):
        budget = {"tokens": round(20 * size), "unique_tokens": round(20 * size)}
        rows += valley([size], [150e6 * 2**step for step in range(6)], 2, lambda own: 3 * own, **budget)
    write_table(rows, tmp_path / "table.csv")
    by_tokens = fit_table(tmp_path / "table.csv", num_draws=200, descents=1)
    assert len(by_tokens.conditions) == 3
    assert "with `--budget ratio` students of equal tokens per parameter share a line" in " ".join(by_tokens.notes)
    (one,) = fit_table(tmp_path / "table.csv", budget="ratio", num_draws=200, descents=1).conditions
    assert one.condition.budget == 20
    assert one.line.with_intercept.slope == pytest.approx(3)


def notes_of(rows, tmp_path):
    write_table(rows, tmp_path / "table.csv")
    return " ".join(fit_table(tmp_path / "table.csv", num_draws=50).notes)


def noisy(**changes):
    return table(noise=0.001, **changes)


def test_what_one_start_lacks_and_another_has_is_said(tmp_path):
    def kept(one):
        return one.student != "s200M" and one.teacher != "t600M"

    random = [one for one in noisy(initialisation="random") if one.teacher and kept(one)]
    notes = notes_of(noisy() + random, tmp_path)
    assert "random, 1.00B tokens, 1 epoch: no student s200M, which other starts have" in notes
    assert "random, 1.00B tokens, 1 epoch, student s100M: no run with teacher t600M, which other" in notes
    assert "direct" not in notes_of(noisy(), tmp_path)


def test_direct_runs_of_other_seeds_are_said(tmp_path):
    rows = [one for one in noisy() if one.teacher or one.seed == 0]
    assert "student s100M: direct runs with seeds: 0, distilled: 0, 1" in notes_of(rows, tmp_path)


@pytest.mark.parametrize("changes", [{"tokens": 1_000_001_000}, {"unique_tokens": None, "epochs": None}])
def test_budgets_that_are_nearly_the_same_are_said_to_be_fitted_apart(tmp_path, changes):
    rows = [replace(one, **changes) if one.teacher == "t600M" else one for one in noisy()]
    assert "are fitted separately, though their budgets are nearly the same" in notes_of(rows, tmp_path)
    assert "fitted separately" not in notes_of(noisy(), tmp_path)


def test_repeated_data_on_purpose_is_another_budget(tmp_path):
    repeated = [replace(one, unique_tokens=one.tokens // 4, epochs=None, student_loss=3.5) for one in noisy()]
    assert "fitted separately" not in notes_of(noisy() + repeated, tmp_path)
    runs, excluded = check_rows(noisy() + repeated, "non_embedding")
    assert not excluded and [run.epochs for run in runs] == [1.0] * 16 + [4.0] * 16


def test_two_seeds_with_one_loss_are_said(tmp_path):
    rows = noisy()
    first = next(one for one in rows if one.teacher == "t600M")
    copied = [replace(one, student_loss=first.student_loss) if one.teacher == "t600M" and one.student == first.student
              else one for one in rows]  # fmt: skip
    assert "seeds with the same loss to the last digit (teacher t600M)" in notes_of(copied, tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"student_loss": 12.2}, "student_loss is 12.2, more than the 10.37 nats of guessing"),
        ({"unique_tokens": 2 * 10**9}, "unique_tokens is 2,000,000,000, more than all 1,000,000,000 tokens"),
        ({"epochs": 7.0}, "epochs is 7, but tokens / unique_tokens is 1"),
    ],
)
def test_what_cannot_be_is_left_out_by_name(changes, reason):
    _, excluded = check_rows(with_row(1, **changes), "non_embedding")
    assert [one.row for one in excluded] == [2]
    assert excluded[0].reason.startswith(reason)


@pytest.mark.parametrize("model", ["student", "teacher"])
def test_students_and_teachers_are_counted_in_the_same_way(model):
    rows = [
        replace(one, **{f"{model}_parameters": getattr(one, f"{model}_non_embedding_parameters")}) for one in table()
    ]
    with pytest.raises(TableError, match=f"mixed: {model}_parameters excludes embeddings, but"):
        check_rows(rows, "non_embedding")


def test_embeddings_smaller_than_the_vocabulary_are_none():
    rows = [replace(one, student_parameters=one.student_non_embedding_parameters + 1) for one in table()]
    with pytest.raises(TableError, match="the two sizes of the student differ by less than one number per token"):
        check_rows(rows, "non_embedding")


def test_a_teacher_of_one_seed_has_one_loss():
    check_rows(with_row(1, teacher_loss=table()[1].teacher_loss * 1.0001), "non_embedding")
    with pytest.raises(TableError, match="teacher t600M of seed 0 has losses"):
        check_rows(with_row(1, teacher_loss=table()[1].teacher_loss - 0.7), "non_embedding")


def test_runs_without_a_teachers_loss_are_named(tmp_path):
    rows = [replace(one, teacher_loss=math.nan) if one.teacher == "t600M" else one for one in noisy()]
    assert "are left out of the scaling law (rows 2, 6, 10, 14)" in notes_of(rows, tmp_path)

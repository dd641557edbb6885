"""What is refused, and what is left out by name: nothing is fitted over silently."""

import math
import re
from dataclasses import replace

import pytest

from minima.errors import TableError
from minima.law.checks import check_rows
from minima.law.fitting import fit_table
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
        ({"initialisation": "direct"}, "direct is without a teacher, and t600M is named"),
        ({"teacher": "", "teacher_parameters": None, "teacher_non_embedding_parameters": None}, "teacher is missing"),
        (
            {"teacher": "t90M", "teacher_parameters": 91_000_000, "teacher_non_embedding_parameters": 90_000_000},
            r"the student \(100,000,000 parameters\) is not smaller than its teacher \(90,000,000\)",
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
        ({"student_parameters": 100_000_000}, "mixed: student_parameters counts no embeddings in row 2"),
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
    assert "student s200M: no run with teacher t1200M, which other students have" in notes
    write_table([one for one in table() if one.seed == 1], tmp_path / "table.csv")
    assert "a single seed (1); nothing has an interval" in " ".join(fit_table(tmp_path / "table.csv").notes)


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

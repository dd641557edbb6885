"""Which teacher to take: each law's answer, its price, and the warnings."""

from dataclasses import replace

import numpy as np
import pytest

from minima.errors import TableError
from minima.law.fit.fitting import fit_table
from minima.law.fit.scaling import PUBLISHED
from minima.law.recommend import PUBLISHED_GAP, PUBLISHED_SCALING, Question, recommend
from minima.law.report import render_recommendation
from minima.law.sizes_text import parse_number, short
from minima.law.table import write_table
from tests.law_tables import row, valley

STUDENTS, TEACHERS = (100e6, 200e6, 400e6), [150e6 * 2**step for step in range(6)]


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    """Pruned students with a line, random ones without."""
    path = tmp_path_factory.mktemp("law") / "table.csv"
    rows = valley(STUDENTS, TEACHERS, 3, lambda size: 4 * size, noise=0.001, direct=True)
    rows += valley(STUDENTS, TEACHERS, 3, lambda size: 90 * size, noise=0.001, initialisation="random")
    write_table(rows, path)
    return fit_table(path, num_draws=500, descents=2)


@pytest.fixture(scope="module")
def scaling_fit(tmp_path_factory):
    """A table that the published scaling law made."""
    rows = []
    for student in (143e6, 300e6, 700e6):
        for tokens in (4 * 10**9, 16 * 10**9, 64 * 10**9):
            same = {"tokens": tokens, "unique_tokens": tokens}
            rows.append(row(student, None, 0, PUBLISHED.supervised.loss(student, tokens), **same))
            for teacher in (300e6, 700e6, 1.8e9, 4.8e9, 12e9):
                if teacher > student:
                    loss = float(PUBLISHED.teacher_loss(teacher))
                    rows.append(row(student, teacher, 0, PUBLISHED.student_loss(student, tokens, loss),
                                    teacher_loss=loss, **same))  # fmt: skip
    path = tmp_path_factory.mktemp("law") / "table.csv"
    write_table(rows, path)
    return fit_table(path, descents=6)


def test_without_tokens_the_papers_law_alone_answers(fit):
    found = recommend(Question(2.7e9), fit)
    (answer,) = found.answers
    assert answer.law == PUBLISHED_GAP
    assert answer.teacher == pytest.approx(6733.1e6, rel=1e-4)
    assert answer.loss is None
    assert answer.cost.sparsity_percent == pytest.approx(59.9, abs=0.05)
    assert answer.cost.width_percent == 37
    assert answer.cost.flops is None
    assert any("only the paper's law answers" in warning for warning in found.warnings)


def test_the_price_is_the_originals_arithmetic():
    """(6 x 3.02e9 + 2 x 6.88e9) x 126e9, which its README rounds to 4.0e9 TFLOPs."""
    (cost,) = recommend(Question(3.02e9, 126e9, (6.88e9,))).costs
    assert cost.flops == pytest.approx(4.02e21, rel=2e-3)


def test_the_published_laws_disagree_and_it_is_said():
    found = recommend(Question(2.7e9, 126e9))
    gap, scaling = found.answers
    assert scaling.law == PUBLISHED_SCALING
    assert gap.teacher == pytest.approx(6733.1e6, rel=1e-4)
    assert scaling.teacher == pytest.approx(PUBLISHED.best_teacher(2.7e9, 126e9))
    assert scaling.loss == pytest.approx(PUBLISHED.loss_under(2.7e9, 126e9, scaling.teacher, 20))
    assert gap.loss == pytest.approx(PUBLISHED.loss_under(2.7e9, 126e9, gap.teacher, 20))
    assert gap.loss_law == PUBLISHED_SCALING
    assert scaling.loss_interval == pytest.approx((0.99 * scaling.loss, 1.01 * scaling.loss))
    low, high = scaling.flat
    assert low < scaling.teacher < high
    assert PUBLISHED.loss_under(2.7e9, 126e9, low, 20) <= scaling.loss + 0.01
    assert any("the laws disagree" in warning for warning in found.warnings)
    assert any("30.6B extrapolates: the largest measured is 12.6B" in warning for warning in found.warnings)


def test_of_the_teachers_at_hand_each_law_takes_one():
    gap, scaling = recommend(Question(2.7e9, 126e9, (7e9, 13e9, 70e9))).answers
    assert gap.teacher == 7e9
    assert gap.ideal == pytest.approx(6733.1e6, rel=1e-4)
    assert scaling.teacher == 70e9
    assert len(scaling.losses) == 3
    assert scaling.loss == min(scaling.losses)
    assert not any("disagree" in one for one in recommend(Question(2.7e9, 126e9, (7e9,))).warnings)


def test_teachers_between_which_no_loss_tells_are_no_disagreement():
    close = recommend(Question(3e9, 20e9, (7.6e9, 8e9)))
    assert {answer.teacher for answer in close.answers} == {7.6e9, 8e9}
    assert not any("disagree" in warning for warning in close.warnings)


def test_tokens_that_need_no_teacher_are_told():
    few, many = (recommend(Question(3e9, tokens, (8e9,))) for tokens in (20e9, 1e12))
    for found, tokens in ((few, 20e9), (many, 1e12)):
        assert found.answers[1].alone == pytest.approx(PUBLISHED.supervised.loss(3e9, tokens))
    assert few.answers[1].alone > few.answers[1].loss and many.answers[1].alone < many.answers[1].loss
    assert any("without a teacher the student would reach 2.001" in warning for warning in many.warnings)
    assert not any("without a teacher" in warning for warning in few.warnings)
    assert few.answers[0].alone is None, "a line says nothing about losses"


@pytest.mark.parametrize(
    ("question", "warning"),
    [
        (Question(3e6), "it has a teacher only for students of more than 7.68M"),
        (Question(10e9), "T* = 25.0B extrapolates: its teachers were 70.0M to 7.00B"),
        (Question(50e6, 1e10), "a student of 50.0M extrapolates: the measured range is 143M to 12.6B"),
        (Question(1e9, 1e12), "1.00T tokens extrapolate: at most 512B were measured"),
        (Question(30e9, 1e8), "the loss still falls at a teacher 1,000 times as large"),
    ],
)
def test_an_answer_outside_of_what_was_measured_is_a_warning(question, warning):
    assert any(warning in one for one in recommend(question).warnings)


def test_a_fitted_line_answers_with_an_interval(fit):
    found = recommend(Question(300e6, 1e9), fit)
    answer = next(one for one in found.answers if "pruned_from_teacher" in one.law and "gap" in one.law)
    assert answer.teacher == pytest.approx(1.2e9, rel=0.05)
    low, high = answer.teacher_interval
    assert low < answer.teacher < high
    assert 1.0 < high / low < 1.5
    assert not answer.notes
    none = next(one for one in found.answers if "random" in one.law and "gap" in one.law)
    assert none.teacher is None
    assert "no line (0 bracketed students)" in none.notes[0]


def test_a_fitted_line_warns_beyond_its_students_and_its_tokens(fit):
    warnings = " ".join(recommend(Question(2.7e9, 126e9), fit).warnings)
    assert "a student of 2.70B extrapolates: the measured range is 100M to 400M" in warnings
    assert "126B tokens extrapolate: it was measured with 1.00B" in warnings


def test_a_fitted_scaling_law_answers_as_the_law_that_made_its_table(scaling_fit):
    found = recommend(Question(300e6, 64e9), scaling_fit)
    answer = found.answers[-1]
    assert answer.law.startswith("distillation scaling, fitted")
    assert answer.teacher == pytest.approx(PUBLISHED.best_teacher(300e6, 64e9), rel=0.1)
    assert answer.loss == pytest.approx(PUBLISHED.loss_under(300e6, 64e9, answer.teacher, 20), rel=2e-3)
    assert not answer.notes
    beyond = " ".join(recommend(Question(3e9, 1e12, (20e9,)), scaling_fit).answers[-1].notes)
    assert "a student of 3.00B extrapolates: the measured range is 143M to 700M" in beyond
    assert "training tokens of 1.00T extrapolates: the measured range is 4.00B to 64.0B" in beyond
    assert "a teacher loss of" in beyond


def test_a_teacher_that_is_no_larger_is_refused():
    with pytest.raises(TableError, match=r"a teacher of 1.00B for a student of 2.70B"):
        recommend(Question(2.7e9, teachers=(1e9,)))


def test_text_shows_every_answer_and_warning(fit):
    found = recommend(Question(300e6, 1e9, (600e6, 2.4e9)), fit)
    text = render_recommendation(found)
    assert all(answer.law in text for answer in found.answers)
    assert all(f"warning: {warning}" in text for warning in found.warnings)
    assert "2.40B" in text


@pytest.mark.parametrize(("text", "value"), [("2.7e9", 2.7e9), ("2.7B", 2.7e9), (" 300M", 3e8), ("50k", 5e4), ("7", 7)])
def test_numbers_as_they_are_typed(text, value):
    assert parse_number(text, "--student") == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "B", "-1", "0", "nan", "inf", "3x"])
def test_what_is_no_positive_number_is_refused(text):
    with pytest.raises(TableError, match="--student"):
        parse_number(text, "--student")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (546e6, "546M"),
        (2.7e9, "2.70B"),
        (85_300, "85.3k"),
        (999_600, "1.00M"),
        (12, "12"),
        (1e12, "1.00T"),
        (10e9, "10.0B"),
    ],
)
def test_numbers_as_they_are_shown(value, text):
    assert short(value) == text


def test_a_line_within_the_noise_is_not_given_as_a_law(tmp_path):
    """Students whose minima are accidents: the share of draws with a line, and no interval that hides it."""
    rng = np.random.default_rng(1)
    rows = valley(STUDENTS, TEACHERS, 2, lambda size: 4 * size, noise=0.02, curvature=0.02, rng=rng)
    write_table(rows, tmp_path / "table.csv")
    fit = fit_table(tmp_path / "table.csv", num_draws=500, descents=2)
    (one,) = fit.conditions
    assert not one.line.fitted or one.line.used_share < 0.95
    answer = next(a for a in recommend(Question(200e6, 1e9), fit).answers if a.law.startswith("capacity gap, fitted"))
    assert any("no line" in note or "of the draws over seeds" in note for note in answer.notes)


def test_a_fitted_line_says_no_loss_of_somebody_elses_law(fit):
    answers = recommend(Question(200e6, 1e9), fit).answers
    own = next(one for one in answers if one.law.startswith("capacity gap, fitted") and one.teacher is not None)
    assert own.loss is None
    assert next(one for one in answers if one.law == PUBLISHED_GAP).loss_law == PUBLISHED_SCALING


def test_each_start_has_a_scaling_law_of_its_own(fit):
    runs = {one.initialisation: one.distilled.num_runs for one in fit.scaling}
    assert runs == {"pruned_from_teacher": 3 * (6 + 5 + 4), "random": 3 * (6 + 5 + 4)}


def test_each_family_has_a_scaling_law_of_its_own(tmp_path):
    rows = valley(STUDENTS, TEACHERS, 1, lambda size: 4 * size, direct=True)
    write_table(rows + [replace(one, family="qwen2") for one in rows], tmp_path / "table.csv")
    found = fit_table(tmp_path / "table.csv", num_draws=10, descents=1).scaling
    assert [(one.family, one.distilled.num_runs) for one in found] == [("llama", 15), ("qwen2", 15)]


def test_a_fit_says_how_it_counts_sizes(fit):
    assert any("counts sizes without embeddings" in warning for warning in recommend(Question(2e8, 1e9), fit).warnings)

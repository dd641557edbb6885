"""The distillation scaling law: the published numbers, its derivatives, and fits that find what made a table."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minima.law.fit.checks import check_rows
from minima.law.fit.scaling import (
    PUBLISHED,
    ScalingLaw,
    distilled_gradient,
    distilled_of,
    supervised_gradient,
    supervised_of,
)
from minima.law.fit.scaling_fit import fit_distilled, fit_supervised, huber, published_error, with_alone
from tests.law_tables import row

SIZES, TOKENS, TEACHERS = (143e6, 300e6, 700e6, 1.8e9), (4e9, 16e9, 64e9, 256e9), (300e6, 700e6, 1.8e9, 4.8e9, 12e9)


def test_the_supervised_law_gives_its_published_value():
    assert PUBLISHED.supervised.loss(1e9, 20e9) == pytest.approx(2.3747, abs=5e-5)


@pytest.mark.parametrize(("teacher_loss", "loss"), [(2.3, 2.3575), (2.0, 2.2768)])
def test_the_distilled_law_gives_its_published_values(teacher_loss, loss):
    assert PUBLISHED.student_loss(1e9, 20e9, teacher_loss) == pytest.approx(loss, abs=5e-5)


def test_the_papers_case_of_a_546m_student():
    assert PUBLISHED.teacher_loss(1.82e9) == pytest.approx(2.251, abs=5e-4)
    assert PUBLISHED.loss_under(546e6, 20 * 546e6, 1.82e9, 20) == pytest.approx(2.424, abs=5e-4)


@pytest.mark.parametrize(
    ("student", "ratio", "best"),
    [(300e6, 320, 10.1), (1e9, 320, 8.48), (3e9, 320, 8.76), (1e9, 80, 10.2), (1e9, 20, 80.9)],
)
def test_the_best_teacher_under_the_published_law(student, ratio, best):
    assert PUBLISHED.best_teacher(student, ratio * student) / student == pytest.approx(best, rel=5e-3)


def test_the_curse_is_shallow():
    losses = [
        PUBLISHED.loss_under(546e6, 320 * 546e6, size * 1e9, 20)
        for size in (0.546, 0.975, 1.82, 2.72, 4.82, 7.75, 12.6)
    ]
    assert losses == pytest.approx([2.516, 2.391, 2.307, 2.282, 2.272, 2.275, 2.282], abs=6e-4)


def test_a_student_that_no_teacher_is_too_large_for_has_no_best_one():
    assert PUBLISHED.best_teacher(30e9, 1e8) is None


def _vector(names, draw):
    return np.array([draw(st.floats(low, high)) for low, high in names])


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_derivatives(data):
    log_n, log_d, log_teacher, log_alone = np.log([[2e8, 3e9], [4e9, 1e11], [2.4, 2.1], [2.8, 2.3]])
    supervised = _vector([(-1, 1), (3, 9), (3, 11), (0.2, 0.6), (0.2, 0.6), (0.3, 1)], data.draw)
    distilled = _vector(
        [(3, 9), (3, 11), (0.2, 0.6), (0.2, 0.6), (0.3, 1), (0, 3), (0, 50), (0.05, 1.5), (-0.5, 0.5)], data.draw
    )

    def of_supervised(vector):
        return supervised_gradient(vector, log_n, log_d)

    def of_distilled(vector):
        return distilled_gradient(vector, log_n, log_d, log_teacher, log_alone)

    for model, vector in ((of_supervised, supervised), (of_distilled, distilled)):
        losses, jacobian = model(vector)
        step = 1e-6
        for index in range(len(vector)):
            moved = np.eye(len(vector))[index] * step
            numeric = (model(vector + moved)[0] - model(vector - moved)[0]) / (2 * step)
            assert jacobian[index] == pytest.approx(numeric, rel=1e-4, abs=1e-6 * losses.max())
    law = supervised_of(supervised), distilled_of(distilled)
    assert of_supervised(supervised)[0] == pytest.approx(law[0].loss(np.exp(log_n), np.exp(log_d)))
    expected = law[1].loss(np.exp(log_n), np.exp(log_d), np.exp(log_teacher), np.exp(log_alone))
    assert of_distilled(distilled)[0] == pytest.approx(expected)


def test_hubers_loss_is_square_near_zero_and_straight_beyond_delta():
    measured = np.log(np.array([2.0, 2.0, 3.0]))
    losses = np.exp(measured + np.array([5e-5, 0.1, -0.2]))
    value, slope = huber(losses, measured)
    assert value == pytest.approx((5e-5**2 / 2 + 1e-4 * (0.1 - 5e-5) + 1e-4 * (0.2 - 5e-5)) / 1e-4)
    for index in range(3):
        moved = np.eye(3)[index] * 1e-8
        numeric = (huber(losses + moved, measured)[0] - huber(losses - moved, measured)[0]) / 2e-8
        assert slope[index] == pytest.approx(numeric, rel=1e-5)


def runs_of(law=PUBLISHED, noise=0.0, seed=0, tokens=TOKENS, direct=True):
    """A table that the law made, with relative noise."""
    rng, rows = np.random.default_rng(seed), []
    for student in SIZES:
        for budget in tokens:
            same = {"tokens": round(budget), "unique_tokens": round(budget)}
            if direct:
                loss = law.supervised.loss(student, budget) * np.exp(noise * rng.standard_normal())
                rows.append(row(student, None, 0, loss, **same))
            for teacher in TEACHERS:
                if teacher > student:
                    teacher_loss = float(law.teacher_loss(teacher))
                    loss = law.student_loss(student, budget, teacher_loss) * np.exp(noise * rng.standard_normal())
                    rows.append(row(student, teacher, 0, loss, teacher_loss=teacher_loss, **same))
    return check_rows(rows, "non_embedding")[0]


def test_without_noise_the_supervised_coefficients_come_back():
    found = fit_supervised(runs_of(), descents=1)  # the best start of the grid is near enough
    for name, value in vars(PUBLISHED.supervised).items():
        assert getattr(found.coefficients, name) == pytest.approx(value, rel=1e-3), name
    assert found.largest_error < 1e-6


@pytest.mark.parametrize(("noise", "loss_error", "teacher_factor"), [(0.0, 5e-4, 1.05), (0.002, 4e-3, 1.25)])
def test_fits_predict_what_made_the_table(noise, loss_error, teacher_factor):
    """The nine coefficients make up for one another, so their predictions are compared, at sizes not in the table."""
    runs = runs_of(noise=noise, seed=1)
    supervised = fit_supervised(runs, descents=6)
    distilled = fit_distilled(runs, supervised.coefficients, descents=8)
    law = ScalingLaw(supervised.coefficients, distilled.coefficients)
    for student in (200e6, 546e6, 1.2e9):
        for ratio in (20, 80, 320):
            for teacher in (2e9, 8e9):
                expected = PUBLISHED.loss_under(student, ratio * student, teacher, 20)
                assert law.loss_under(student, ratio * student, teacher, 20) == pytest.approx(expected, rel=loss_error)
    best, expected = law.best_teacher(546e6, 320 * 546e6), PUBLISHED.best_teacher(546e6, 320 * 546e6)
    assert expected / teacher_factor < best < expected * teacher_factor
    assert distilled.median_error < max(2 * noise, 1e-4)
    assert distilled.median_error < distilled.largest_error < max(5 * noise, 1e-3)
    assert published_error(runs) < max(2 * noise, 1e-6)


def test_students_measured_alone_stand_in_for_the_supervised_law():
    runs = runs_of(tokens=(16e9,))
    supervised = fit_supervised(runs)
    assert not supervised.fitted
    assert "direct cells: 4, sizes: 4, token budgets: 1" in supervised.reason
    distilled = fit_distilled(runs, None, descents=8)
    assert distilled.fitted
    assert distilled.reason == "a single token budget: what it does is not measured"
    assert distilled.largest_error < 2e-3


def test_the_loss_of_a_student_alone_is_the_laws_or_the_mean_of_its_own_runs():
    runs = runs_of(noise=0.01)
    first, other = (next(run for run in runs_of(noise=0.01, seed=seed) if not run.teacher) for seed in (0, 1))
    runs.append(replace(other, seed=1))
    taken, alone = with_alone(runs, PUBLISHED.supervised)
    assert alone == pytest.approx([PUBLISHED.supervised.loss(run.student_size, run.tokens) for run in taken])
    _, alone = with_alone(runs, None)
    same = [(run.student, run.tokens) == (first.student, first.tokens) for run in taken]
    assert sum(same) == len(TEACHERS) and alone[same] == pytest.approx((first.loss + other.loss) / 2)


@pytest.mark.parametrize("runs", [runs_of(direct=False), runs_of(tokens=(16e9,))[:9]])
def test_too_few_cells_are_not_fitted(runs):
    found = fit_distilled(runs, None)
    assert not found.fitted
    assert found.coefficients is None
    assert "nine coefficients take 10" in found.reason


def test_one_bad_run_moves_the_fit_little():
    """That is what Huber's loss is for."""
    rows = runs_of()
    spoilt = [
        run if index != 20 else type(run)(**(vars(run) | {"loss": 1.5 * run.loss})) for index, run in enumerate(rows)
    ]
    found = fit_supervised(spoilt, descents=6), fit_distilled(spoilt, PUBLISHED.supervised, descents=8)
    assert found[0].median_error < 1e-3
    assert found[1].median_error < 1e-3


def test_students_better_than_their_teachers_are_named_and_not_fitted():
    runs = [replace(run, loss=run.teacher_loss - 0.01) if run.teacher and run.seed == 0 and run.number % 3 == 0 else run
            for run in runs_of()]  # fmt: skip
    better = [run.number for run in runs if run.teacher and run.loss < run.teacher_loss]
    found = fit_distilled(runs, PUBLISHED.supervised, descents=2)
    assert not found.fitted
    assert f"{len(better)} of" in found.reason and f"rows {better[0]}, {better[1]}" in found.reason


def test_a_table_of_another_form_is_not_fitted():
    rng = np.random.default_rng(0)
    runs = [replace(run, loss=(run.teacher_loss + 0.01 if run.teacher else run.loss) * rng.uniform(1.0, 1.6))
            for run in runs_of()]  # fmt: skip
    found = fit_distilled(runs, PUBLISHED.supervised, descents=2)
    assert not found.fitted
    assert "the law does not describe them" in found.reason

"""The line T* = a S + b: the paper's numbers, and lines that are known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import f, linregress, t

from minima.law.fit.interpolate import MINIMUM, NOT_BRACKETED, Minimum
from minima.law.fit.line import SMALLEST_PAPER_STUDENT, fit_line, paper_teacher, prediction_interval
from minima.law.fit.noise import Noise


def minimum(student, teacher):
    status = NOT_BRACKETED if teacher is None else MINIMUM
    return Minimum(
        f"s{student:g}", round(student), 10**9, status, "the edge" if teacher is None else "", "t", (),
        Noise(False, 0, None), teacher_size=teacher,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("student", "teacher", "ratio"),
    [(100e6, 238.3e6, 2.383), (300e6, 737.9e6, 2.460), (1e9, 2486.5e6, 2.487), (2.7e9, 6733.1e6, 2.494)],
)
def test_the_papers_line_gives_its_table(student, teacher, ratio):
    assert paper_teacher(student) == pytest.approx(teacher, rel=1e-4)
    assert paper_teacher(student) / student == pytest.approx(ratio, abs=6e-4)


@pytest.mark.parametrize(("teacher", "student"), [(6.88e9, 2.76e9), (13.0e9, 5.2e9), (69e9, 27.6e9)])
def test_the_papers_line_backwards(teacher, student):
    assert paper_teacher(student) == pytest.approx(teacher, rel=3e-3)


def test_the_smallest_student_that_the_papers_line_has_a_larger_teacher_for():
    assert paper_teacher(SMALLEST_PAPER_STUDENT) == pytest.approx(SMALLEST_PAPER_STUDENT)


@settings(max_examples=30, deadline=None)
@given(slope=st.floats(1.5, 20), intercept=st.floats(-50, 500), number=st.integers(3, 8))
def test_a_line_is_found_exactly(slope, intercept, number):
    students = 100e6 * np.arange(1, number + 1)
    found = fit_line([minimum(size, slope * size + intercept * 1e6) for size in students], [None] * number)
    assert found.with_intercept.slope == pytest.approx(slope, rel=1e-6)
    assert found.with_intercept.intercept == pytest.approx(intercept, abs=1e-3)
    assert found.with_intercept.r2 == pytest.approx(1, abs=1e-6)
    assert found.with_intercept.slope_interval is None
    assert found.without_intercept.r2 <= found.with_intercept.r2 + 1e-9


def test_a_student_that_is_not_bracketed_takes_no_part():
    given_minima = [minimum(1e8, 2.5e8), minimum(2e8, 5e8), minimum(3e8, None), minimum(4e8, 10e8)]
    found = fit_line(given_minima, [None] * 4)
    assert found.students == ("s1e+08", "s2e+08", "s4e+08")
    assert found.left_out == (("s3e+08", "not bracketed: the edge"),)
    assert found.with_intercept.slope == pytest.approx(2.5)


def test_intervals_from_the_scatter_are_those_of_ordinary_regression():
    students, best = np.array([100.0, 200, 300, 500]), np.array([260.0, 470, 800, 1240])
    found = fit_line([minimum(1e6 * s, 1e6 * b) for s, b in zip(students, best, strict=True)], [None] * 4)
    reference, reach = linregress(students, best), t.ppf(0.975, 2)
    line = found.with_intercept
    assert line.slope == pytest.approx(reference.slope)
    assert line.r2 == pytest.approx(reference.rvalue**2)
    low, high = line.slope_scatter_interval
    assert (high - low) / 2 == pytest.approx(reach * reference.stderr)
    low, high = line.intercept_scatter_interval
    assert (high - low) / 2 == pytest.approx(reach * reference.intercept_stderr)
    alone = found.without_intercept  # least squares through the origin, by hand
    ratio = (students @ best) / (students @ students)
    error = np.sqrt(((best - ratio * students) ** 2).sum() / 3 / (students @ students))
    assert alone.slope_scatter_interval == pytest.approx(
        (ratio - t.ppf(0.975, 3) * error, ratio + t.ppf(0.975, 3) * error)
    )


def test_two_students_make_no_line():
    found = fit_line([minimum(1e8, 2.5e8), minimum(2e8, 5e8), minimum(3e8, None)], [None] * 3)
    assert not found.fitted
    assert found.with_intercept is None
    assert found.agreement is None


def noisy(slope, intercept, students, noise=0.02, seed=0):
    rng = np.random.default_rng(seed)
    best = [(slope * size / 1e6 + intercept) * 1e6 for size in students]
    means = [size * np.exp(noise * rng.standard_normal()) for size in best]
    draws = [size * np.exp(noise * rng.standard_normal(1000)) for size in means]
    return fit_line([minimum(size, mean) for size, mean in zip(students, means, strict=True)], draws)


def test_the_papers_line_is_rejected_where_it_is_wrong_and_not_where_it_is_right():
    students = (100e6, 200e6, 300e6, 500e6, 800e6)
    right, wrong = noisy(2.498, -11.498, students).agreement, noisy(4.0, 0.0, students).agreement
    assert right.rejected is False
    assert wrong.rejected is True
    assert wrong.seeds_p < 0.01
    assert wrong.scatter_p < 0.01


def test_one_of_the_two_tests_rejects_the_papers_line():
    """Minima that scatter by more than seeds move them: the draws alone tell the line from the paper's."""
    students, rng = (100e6, 200e6, 300e6, 500e6, 800e6), np.random.default_rng(0)
    means = [paper_teacher(size) * np.exp(0.2 * rng.standard_normal()) for size in students]
    draws = [size * np.exp(0.001 * rng.standard_normal(1000)) for size in means]
    found = fit_line([minimum(size, mean) for size, mean in zip(students, means, strict=True)], draws).agreement
    assert found.seeds_p < 0.01 < 0.1 < found.scatter_p
    assert found.rejected is True


def test_the_test_by_scatter_is_the_textbooks():
    students, best = np.array([100.0, 200, 300, 500]), np.array([260.0, 470, 800, 1240])
    found = fit_line([minimum(1e6 * s, 1e6 * b) for s, b in zip(students, best, strict=True)], [None] * 4)
    slope, intercept = np.polyfit(students, best, 1)
    left, papers = (((best - a * students - b) ** 2).sum() for a, b in ((slope, intercept), (2.498, -11.498)))
    assert found.agreement.scatter_p == pytest.approx(f.sf((papers - left) / 2 / (left / 2), 2, 2))
    assert found.agreement.seeds_p is None


@pytest.mark.parametrize("students", [(50e3, 100e3, 200e3, 400e3), (5e6, 100e6, 200e6, 400e6)])
def test_small_students_are_compared_by_the_slope_alone(students):
    agreement = noisy(2.498, 0.0, students).agreement
    assert agreement.rejected is False
    assert "only the slope without intercept" in agreement.test
    assert noisy(9.0, 0.0, students).agreement.rejected is True


def test_draws_beyond_the_grid_are_left_out_and_counted():
    students, rng = (100e6, 200e6, 300e6), np.random.default_rng(0)
    draws = [2.5 * size * np.exp(0.01 * rng.standard_normal(1000)) for size in students]
    draws[1][:40] = np.inf
    found = fit_line([minimum(size, 2.5 * size) for size in students], draws)
    assert found.used_share == 0.96
    assert found.with_intercept.slope_interval[0] < 2.5 < found.with_intercept.slope_interval[1]
    assert len(found.draws) == 400
    draws[1][:250] = np.inf
    found = fit_line([minimum(size, 2.5 * size * (1 + 1e-3 * place)) for place, size in enumerate(students)], draws)
    assert found.used_share == 0.75
    assert found.with_intercept.slope_interval is None
    assert found.agreement.seeds_p is None
    assert found.draws == ()


def test_a_draw_without_one_students_minimum_is_a_line_through_the_others():
    students = (100e6, 200e6, 300e6, 500e6)
    draws = [np.full(1000, 2.5 * size + 10e6) for size in students]
    draws[0][:300], draws[3][300:700] = 0.0, np.inf  # beyond the smallest teacher, and beyond the largest
    found = fit_line([minimum(size, 2.5 * size + 10e6) for size in students], draws)
    assert found.used_share == 1.0
    for ends, value in ((found.with_intercept.slope_interval, 2.5), (found.with_intercept.intercept_interval, 10.0)):
        assert ends == pytest.approx((value, value))


def test_students_of_one_size_make_no_line():
    assert not fit_line([minimum(100e6, best) for best in (2e8, 3e8, 4e8)], [None] * 3).fitted
    assert not fit_line([minimum(size, 2 * size) for size in (1e8, 1e8, 2e8)], [None] * 3).fitted


def test_the_interval_of_one_more_student_is_the_textbooks():
    students, best = np.array([100.0, 200.0, 300.0, 500.0]), np.array([260.0, 480.0, 790.0, 1210.0])
    found = fit_line([minimum(size * 1e6, at * 1e6) for size, at in zip(students, best, strict=True)], [None] * 4)
    low, high = prediction_interval(found.with_intercept, list(zip(students * 1e6, best * 1e6, strict=True)), 400e6)
    known = linregress(students, best)
    error = np.sqrt(((best - known.slope * students - known.intercept) ** 2).sum() / 2)
    spread = np.sqrt(1 + 1 / 4 + (400 - students.mean()) ** 2 / ((students - students.mean()) ** 2).sum())
    reach, middle = t.ppf(0.975, 2) * error * spread, known.slope * 400 + known.intercept
    assert (low, high) == pytest.approx(((middle - reach) * 1e6, (middle + reach) * 1e6))


def test_r2_without_an_intercept_is_measured_around_the_mean_too():
    found = fit_line([minimum(size, best) for size, best in ((1e8, 9e8), (2e8, 5e8), (3e8, 1e8))], [None] * 3)
    assert found.without_intercept.r2 < 0
    assert found.with_intercept.r2 == pytest.approx(1)

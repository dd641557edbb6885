"""The law of capacity gap: T* = a S + b over the students whose best teacher is bracketed, and the paper's own line.

Published (arXiv 2311.07052; read second-hand, see docs/law.md): T* = 2.498 S - 11.498 in millions of parameters,
R2 = 0.9957. Sizes in this file are millions.

Shapes: B draws, S students.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import f as f_distribution
from scipy.stats import t as t_distribution

from minima.law.fit.interpolate import LEVEL, MINIMUM, Interval, Minimum, interval

MILLION = 1e6
PAPER_SLOPE, PAPER_INTERCEPT = 2.498, -11.498  # with R^2 = 0.9957
PAPER_TEACHERS = (70e6, 7e9)  # GPT-2 and Pythia teachers of 70M to 2.8B, and LLaMA2-7B
SMALLEST_PAPER_STUDENT = -PAPER_INTERCEPT / (PAPER_SLOPE - 1) * MILLION  # below, its teacher is no larger: 7.7M
FEWEST_STUDENTS = 3
ENOUGH_DRAWS = 0.95  # share of draws that have a line; if fewer do, these are a biased selection
_KEPT_DRAWS = 400  # of (a, b), for the intervals of teachers that are asked for later
REJECTED = 0.025  # for each of two tests, so at most 5 % for both together


@dataclass(frozen=True)
class LineFit:
    """One least-squares line, with the same weight for each student."""

    slope: float  # a
    intercept: float  # b, millions of parameters; 0 without an intercept
    slope_interval: Interval | None  # over seeds; None with one seed
    intercept_interval: Interval | None  # over seeds; None with one seed or without an intercept
    slope_scatter_interval: Interval | None  # from the scatter of the students around the line (Student's t)
    intercept_scatter_interval: Interval | None  # the same for b; None without an intercept
    # 1 - residual / total sum of squares around the mean, with and without an intercept; it can be negative
    r2: float | None


@dataclass(frozen=True)
class Agreement:
    """How the paper's line agrees with the fitted one."""

    test: str  # what was tested, in words
    # share of the draws that are at least as far from the fit as the paper's line is (distance in the draws' own
    # covariance); None without draws or noise
    seeds_p: float | None
    scatter_p: float | None  # p of the F test that the paper's line fits the minima as well as the best line does
    rejected: bool | None  # whether one of the two is below 0.025; None if neither could be computed


@dataclass(frozen=True)
class Line:
    """The law under one condition."""

    students: tuple[str, ...]  # names of the students that the line is fitted to
    left_out: tuple[tuple[str, str], ...]  # names of the others, with the reason
    fitted: bool  # False if fewer than three students are bracketed; then the fields below are None
    student_range: tuple[float, float] | None = None  # smallest and largest of the fitted students, parameters
    with_intercept: LineFit | None = None  # T* = a S + b
    without_intercept: LineFit | None = None  # T* = a S
    # share of the draws in which at least three students have a minimum. Below 0.95 there are no intervals over seeds:
    # the remaining draws would be a biased selection
    used_share: float | None = None
    agreement: Agreement | None = None  # agreement with the paper's line
    draws: tuple[tuple[float, float], ...] = ()  # pairs (a, b) over seeds, at most 400 of them


def paper_teacher(student_size: float) -> float:
    """The paper's best teacher for a student; both in parameters."""
    return (PAPER_SLOPE * student_size / MILLION + PAPER_INTERCEPT) * MILLION


def fit_line(minima: Sequence[Minimum], sizes_SB: Sequence[np.ndarray | None]) -> Line:
    """Fit the line through the bracketed minima of one condition.

    Args:
        sizes_SB: draws of each best teacher's size in parameters, from `minimum_of`.
    """
    taken = [index for index, minimum in enumerate(minima) if minimum.status == MINIMUM]
    names = tuple(minima[index].student for index in taken)
    left_out = tuple((one.student, f"{one.status}: {one.reason}") for one in minima if one.status != MINIMUM)
    if len({minima[index].student_size for index in taken}) < FEWEST_STUDENTS:
        return Line(names, left_out, fitted=False)
    student_S = np.array([minima[index].student_size for index in taken]) / MILLION
    best_S = np.array([minima[index].teacher_size for index in taken], dtype=float) / MILLION
    drawn = [sizes_SB[index] for index in taken]
    lines_B2 = ratios_B = None
    share = None
    if all(one is not None for one in drawn):
        best_BS = np.stack([one for one in drawn if one is not None], axis=1) / MILLION
        there_BS = np.isfinite(best_BS) & (best_BS > 0)
        enough_B = np.array([len(np.unique(student_S[there_S])) for there_S in there_BS]) >= FEWEST_STUDENTS
        share = float(enough_B.mean())
        if share >= ENOUGH_DRAWS and enough_B.sum() >= 100:  # fewer draws give no 2.5 % quantiles
            lines_B2, ratios_B = _least_squares(student_S, best_BS[enough_B], there_BS[enough_B])
    both = _line_with_intercept(student_S, best_S, lines_B2)
    alone = _line_without_intercept(student_S, best_S, ratios_B)
    kept = () if lines_B2 is None else tuple((float(a), float(b)) for a, b in lines_B2[:_KEPT_DRAWS])
    ends = (float(student_S.min()) * MILLION, float(student_S.max()) * MILLION)
    agreement = _agreement(student_S, best_S, both, alone, lines_B2, ratios_B)
    return Line(names, left_out, True, ends, both, alone, share, agreement, kept)


def _least_squares(student_S: np.ndarray, best_BS: np.ndarray, there_BS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slope and intercept, and slope without intercept, of each draw over the students that have a minimum in it."""
    best_BS = np.where(there_BS, best_BS, 0.0)
    x_BS = np.where(there_BS, student_S, 0.0)
    count_B = there_BS.sum(axis=1)
    mean_x_B, mean_y_B = x_BS.sum(axis=1) / count_B, best_BS.sum(axis=1) / count_B
    away_BS = np.where(there_BS, student_S - mean_x_B[:, None], 0.0)
    slope_B = (away_BS * best_BS).sum(axis=1) / (away_BS**2).sum(axis=1)
    return np.stack([slope_B, mean_y_B - slope_B * mean_x_B], axis=1), (x_BS * best_BS).sum(axis=1) / (x_BS**2).sum(1)


def _line_with_intercept(student_S: np.ndarray, best_S: np.ndarray, lines_B2: np.ndarray | None) -> LineFit:
    everywhere = np.ones((1, len(student_S)), dtype=bool)
    slope, intercept = _least_squares(student_S, best_S[None], everywhere)[0][0]
    spare = len(student_S) - 2
    mean, spread = student_S.mean(), ((student_S - student_S.mean()) ** 2).sum()
    error = np.sqrt(_squares(best_S - slope * student_S - intercept) / spare)
    reach = t_distribution.ppf((1 + LEVEL) / 2, spare) * error
    of_slope, of_intercept = reach / np.sqrt(spread), reach * np.sqrt(1 / len(student_S) + mean**2 / spread)
    return LineFit(
        float(slope), float(intercept),
        None if lines_B2 is None else interval(lines_B2[:, 0]), None if lines_B2 is None else interval(lines_B2[:, 1]),
        (float(slope - of_slope), float(slope + of_slope)),
        (float(intercept - of_intercept), float(intercept + of_intercept)),
        _r2(best_S, slope * student_S + intercept),
    )  # fmt: skip


def _line_without_intercept(student_S: np.ndarray, best_S: np.ndarray, ratios_B: np.ndarray | None) -> LineFit:
    slope = float((student_S * best_S).sum() / _squares(student_S))
    error = np.sqrt(_squares(best_S - slope * student_S) / (len(student_S) - 1) / _squares(student_S))
    reach = float(t_distribution.ppf((1 + LEVEL) / 2, len(student_S) - 1) * error)
    over_seeds = None if ratios_B is None else interval(ratios_B)
    return LineFit(
        slope, 0.0, over_seeds, None, (slope - reach, slope + reach), None, _r2(best_S, slope * student_S)
    )  # fmt: skip


def prediction_interval(line: LineFit, students: Sequence[tuple[float, float]], size: float) -> tuple[float, float]:
    """Prediction interval of another student's best teacher, from the scatter around the line, in parameters.

    Args:
        line: a line with an intercept.
        students: size and best teacher of each student that the line is fitted to, parameters; at least three.
        size: size of the student that is asked about, parameters.

    Returns:
        Its ends; the lower one may lie below 0.
    """
    student_S, best_S = (np.array(values) / MILLION for values in zip(*students, strict=True))
    spare, at = len(student_S) - 2, size / MILLION
    error = np.sqrt(_squares(best_S - line.slope * student_S - line.intercept) / spare)
    away = student_S - student_S.mean()
    reach = t_distribution.ppf((1 + LEVEL) / 2, spare) * error
    reach *= np.sqrt(1 + 1 / len(student_S) + (at - student_S.mean()) ** 2 / _squares(away))
    middle = line.slope * at + line.intercept
    return float(middle - reach) * MILLION, float(middle + reach) * MILLION


def _agreement(
    student_S: np.ndarray, best_S: np.ndarray, both: LineFit, alone: LineFit,
    lines_B2: np.ndarray | None, ratios_B: np.ndarray | None,
) -> Agreement:  # fmt: skip
    if student_S.min() * MILLION > SMALLEST_PAPER_STUDENT:
        test = f"a = {PAPER_SLOPE} and b = {PAPER_INTERCEPT} together"
        paper = np.array([PAPER_SLOPE, PAPER_INTERCEPT])
        fit, draws, spare = np.array([both.slope, both.intercept]), lines_B2, len(student_S) - 2
        own_S = both.slope * student_S + both.intercept
    else:
        test = (
            f"only the slope without intercept, against {PAPER_SLOPE}: the paper's line gives students of less "
            f"than {SMALLEST_PAPER_STUDENT / MILLION:.1f}M a teacher no larger than they are, so it says nothing here"
        )
        paper, fit, spare = np.array([PAPER_SLOPE]), np.array([alone.slope]), len(student_S) - 1
        draws, own_S = None if ratios_B is None else ratios_B[:, None], alone.slope * student_S
    paper_S = paper[0] * student_S + (paper[1] if len(paper) > 1 else 0.0)
    left, more = _squares(best_S - own_S), _squares(best_S - paper_S)
    scatter_p = None
    if left > 1e-12 * _squares(best_S):
        scatter_p = float(f_distribution.sf((more - left) / len(paper) / (left / spare), len(paper), spare))
    seeds_p = None if draws is None else _distance_p(draws, fit, paper)
    known = [p for p in (seeds_p, scatter_p) if p is not None]
    return Agreement(test, seeds_p, scatter_p, min(known) < REJECTED if known else None)


def _distance_p(draws_BP: np.ndarray, fit_P: np.ndarray, other_P: np.ndarray) -> float | None:
    """Share of the draws at least as far from the fit as `other_P` is, by the draws' own covariance."""
    scale_P = draws_BP.std(axis=0)
    if not (scale_P > 1e-9 * np.abs(fit_P)).all():
        return None
    away_BP, away_P = (draws_BP - fit_P) / scale_P, (other_P - fit_P) / scale_P
    inverse_PP = np.linalg.pinv(np.atleast_2d(np.cov(away_BP, rowvar=False)))
    distance_B = np.einsum("bp,pq,bq->b", away_BP, inverse_PP, away_BP)
    return float((1 + (distance_B >= away_P @ inverse_PP @ away_P).sum()) / (1 + len(distance_B)))


def _squares(values: np.ndarray) -> float:
    return float((values**2).sum())


def _r2(best_S: np.ndarray, line_S: np.ndarray) -> float | None:
    total = _squares(best_S - best_S.mean())
    return 1 - _squares(best_S - line_S) / total if total > 0 else None

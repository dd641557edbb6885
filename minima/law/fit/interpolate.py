"""The best teacher of one student: the lowest point of a parabola in log teacher size.

It is fitted to the teacher with the lowest mean loss and up to two neighbours on each side, each mean with the same
weight: points farther away say little about where the minimum is, and over decades the curve is not a parabola.

Shapes: B draws, T teachers of the curve.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.stats import f as f_distribution

from minima.law.fit.curves import Curve
from minima.law.fit.noise import Noise, noise_of

NEIGHBOURS = 2  # on each side: with three, the parabola would span a factor of 16 and more on a grid of doublings
LEVEL = 0.95
MINIMUM, NOT_BRACKETED, TOO_FEW, NOISE = "minimum", "not bracketed", "too few teachers", "within the noise"
FLAT_P = 0.05  # above this, all teachers may be equally good
Interval = tuple[float | None, float | None]  # None for an end that lies beyond the grid


@dataclass(frozen=True)
class Minimum:
    """The best teacher of one student under one condition."""

    student: str
    student_size: int  # its parameters
    tokens: int  # tokens of its training
    # `minimum`, `not bracketed`, `too few teachers`, or `within the noise`: the teachers differ no more than seeds do,
    # so that the lowest of them is a matter of chance
    status: str
    reason: str  # why there is no minimum; empty if there is one
    grid_best: str  # name of the teacher with the lowest mean loss
    used: tuple[str, ...]  # names of the teachers that the parabola is fitted to
    noise: Noise  # the seed noise
    teacher_size: float | None = None  # parameters of the best teacher, interpolated; None without a minimum
    teacher_interval: Interval | None = None  # its interval over seeds; None with one seed or without a minimum
    loss: float | None = None  # loss at the minimum, nats per token
    loss_interval: Interval | None = None  # its interval over seeds, among the draws that have a minimum
    bracketed_share: float | None = None  # share of the draws that have a minimum; None with one seed
    # how much higher than the minimum the smallest and the largest teacher of the grid are, nats per token
    rises: tuple[float, float] | None = None
    # probability of missing the means by this much if the parabola were right (F test against the seed noise); None
    # with three points or one seed
    misfit_p: float | None = None
    # probability of means this different if all teachers were equally good (F test against the seed noise); None with
    # one seed
    flat_p: float | None = None


@dataclass(frozen=True)
class Lowest:
    """Lowest points of several curves over the same teachers."""

    # natural logarithm of the best teacher's parameters; -inf or inf if it lies beyond the smallest or the largest
    # teacher
    log_size_B: np.ndarray
    loss_B: np.ndarray  # loss there; nan if it lies beyond


def window(best: int, num_teachers: int) -> slice:
    """The points around the best one that the parabola is fitted to."""
    return slice(max(0, best - NEIGHBOURS), min(num_teachers, best + NEIGHBOURS + 1))


def lowest_points(sizes: Sequence[float], means_BT: np.ndarray) -> Lowest:
    """The interpolated minimum of each row of means, or the side of the grid beyond which it lies."""
    log_sizes_T = np.log(np.asarray(sizes, dtype=float))
    num_draws, num_teachers = means_BT.shape
    log_size_B, loss_B = np.empty(num_draws), np.full(num_draws, np.nan)
    best_B = means_BT.argmin(axis=1)
    for best in np.unique(best_B):
        rows = np.flatnonzero(best_B == best)
        if best in (0, num_teachers - 1):
            log_size_B[rows] = -np.inf if best == 0 else np.inf
            continue
        part = window(int(best), num_teachers)
        x_P = log_sizes_T[part] - log_sizes_T[best]
        level, slope, curvature = np.linalg.pinv(np.vander(x_P, 3, increasing=True)) @ means_BT[rows][:, part].T
        opens_up = curvature > 0
        safe = np.where(opens_up, curvature, 1.0)
        vertex = np.where(opens_up, -slope / (2 * safe), np.where(slope > 0, -np.inf, np.inf))
        inside = opens_up & (vertex >= x_P[0]) & (vertex <= x_P[-1])
        outside = np.where(vertex < 0, -np.inf, np.inf)
        log_size_B[rows] = np.where(inside, vertex + log_sizes_T[best], outside)
        loss_B[rows] = np.where(inside, level - slope**2 / (4 * safe), np.nan)
    return Lowest(log_size_B, loss_B)


def interval(values_B: np.ndarray) -> Interval:
    """The central interval of draws that holds a share of LEVEL; an infinite end becomes None."""
    ends = np.quantile(values_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    low, high = (float(end) if np.isfinite(end) else None for end in ends)
    return low, high


def minimum_of(curve: Curve, means_BT: np.ndarray | None) -> tuple[Minimum, np.ndarray | None]:
    """The best teacher of one student, and the draws of its size for the line.

    Args:
        means_BT: draws of its means over seeds; None with one seed.

    Returns:
        The minimum, and sizes_B (parameters; 0 and inf beyond the grid), which is None without draws.
    """
    means_T, num_teachers = curve.means_T, len(curve.teachers)
    best = int(means_T.argmin())
    base = partial(
        Minimum,
        student=curve.student,
        student_size=curve.size,
        tokens=curve.tokens,
        noise=noise_of(curve),
        grid_best=curve.teachers[best],
        flat_p=(flat_p := _flat(curve)),
    )
    if len(set(curve.sizes)) < 3:
        reason = f"{num_teachers} teacher{'s' if num_teachers > 1 else ''}; a parabola needs three sizes"
        return base(status=TOO_FEW, reason=reason, used=()), None
    lowest = lowest_points(curve.sizes, means_T[None])
    drawn = None if means_BT is None else lowest_points(curve.sizes, means_BT)
    share = None if drawn is None else float(np.isfinite(drawn.log_size_B).mean())
    sizes_B = None if drawn is None else np.exp(drawn.log_size_B)
    used = curve.teachers[window(best, num_teachers)]
    if flat_p is not None and flat_p > FLAT_P:
        reason = f"the teachers differ no more than seeds do (F test, p = {flat_p:.2g})"
        return base(status=NOISE, reason=reason, used=used, bracketed_share=share), sizes_B
    if not np.isfinite(lowest.log_size_B[0]):
        reason = f"the {'smallest' if best == 0 else 'largest'} teacher has the lowest loss"
        if best not in (0, num_teachers - 1):
            reason = "the parabola opens downwards, or its lowest point lies outside its points"
        return base(status=NOT_BRACKETED, reason=reason, used=used, bracketed_share=share), sizes_B
    loss = float(lowest.loss_B[0])
    losses_B = None if drawn is None else drawn.loss_B[np.isfinite(drawn.loss_B)]
    found = base(
        status=MINIMUM,
        reason="",
        used=used,
        teacher_size=float(np.exp(lowest.log_size_B[0])),
        teacher_interval=None if sizes_B is None else _sizes_interval(sizes_B),
        loss=loss,
        loss_interval=interval(losses_B) if losses_B is not None and losses_B.size else None,
        bracketed_share=share,
        rises=(float(means_T[0]) - loss, float(means_T[-1]) - loss),
        misfit_p=_misfit(curve, best),
    )
    return found, sizes_B


def _sizes_interval(sizes_B: np.ndarray) -> Interval:
    low, high = interval(sizes_B)
    return (low or None), high  # a size of 0 is exp(-inf): beyond the smallest teacher


def _flat(curve: Curve) -> float | None:
    noise, num_teachers = noise_of(curve), len(curve.teachers)
    if not noise.deviation or num_teachers < 2:
        return None
    ratio = curve.effects.explained / (num_teachers - 1) / noise.deviation**2
    return float(f_distribution.sf(ratio, num_teachers - 1, noise.freedom))


def _misfit(curve: Curve, best: int) -> float | None:
    part = window(best, len(curve.teachers))
    x_P = np.log(np.asarray(curve.sizes[part], dtype=float))
    noise = noise_of(curve)
    spare = len(x_P) - 3
    if spare <= 0 or not noise.deviation:
        return None
    means_P = curve.means_T[part]
    terms = np.vander(x_P - x_P.mean(), 3)
    missed_P = means_P - terms @ np.linalg.lstsq(terms, means_P, rcond=None)[0]
    num_runs_P = np.array([len(by_seed) for by_seed in curve.losses[part]])
    ratio = float((num_runs_P * missed_P**2).sum()) / spare / noise.deviation**2
    return float(f_distribution.sf(ratio, spare, noise.freedom))

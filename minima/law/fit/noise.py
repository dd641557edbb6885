"""Seed noise: other mean losses that the same grid could have given, drawn by a multiplier bootstrap over seeds.

Resampling two or three whole seeds has only three or ten different outcomes, and intervals from it are far too narrow.
So the residuals over seeds are drawn instead, each with a random Gaussian weight (Wu, 1986; Mammen, 1993). A seed's
effect common to all teachers of a student is removed first if the seeds are shared (pairing); the rest is what can move
the best teacher. Its variance is pooled over the teachers of a student. A (teacher, seed) pair gets the same weight for
all students, because they share that teacher, so the noise of different students is drawn with its correlation. Each
draw is widened by sqrt(f / chi2_f), f being the residuals' degrees of freedom, as in Student's t: the variance itself
is known only from few residuals.

Shapes: B draws, T teachers of a curve, U teachers of a condition, Q (teacher, seed) pairs of a condition.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2

from minima.law.fit.curves import Curve


@dataclass(frozen=True)
class Noise:
    """What the seeds say about the noise of one curve."""

    paired: bool  # whether the seeds' common effect was taken out
    freedom: int  # degrees of freedom of the residuals; 0 if every teacher has one run
    # standard deviation of one run around its teacher's mean, nats per token; None without freedom
    deviation: float | None


def residuals(curve: Curve) -> tuple[dict[tuple[str, int], float], int]:
    """The residuals of a curve by (teacher, seed), and their degrees of freedom (see `Curve.effects`)."""
    effects = curve.effects
    return {(curve.teachers[place], seed): rest for (place, seed), rest in effects.rests.items()}, effects.freedom


def noise_of(curve: Curve) -> Noise:
    """The seed noise of one curve."""
    found, freedom = residuals(curve)
    deviation = float(np.sqrt(sum(value**2 for value in found.values()) / freedom)) if freedom else None
    return Noise(curve.effects.paired, freedom, deviation)


def draw_means(curves: Sequence[Curve], num_draws: int, seed: int) -> list[np.ndarray | None]:
    """Draw mean losses of every curve of one condition, as other seeds might have given them.

    Args:
        seed: seed of the draws; the same seed and curves give the same draws, whatever else is in the table.

    Returns:
        For each curve means_BT, nats per token; None if no teacher has two runs.
    """
    teachers = sorted({teacher for curve in curves for teacher in curve.teachers})
    pairs = sorted({(name, key) for curve in curves for name in curve.teachers for key in curve.seeds})
    generator = np.random.default_rng([seed, zlib.crc32(repr(curves[0].condition).encode())])
    weights_BUQ = generator.standard_normal((num_draws, len(teachers), len(pairs)))
    uniform_B = generator.uniform(size=num_draws)
    drawn: list[np.ndarray | None] = []
    for curve in curves:
        found, freedom = residuals(curve)
        if not freedom:
            drawn.append(None)
            continue
        residuals_Q = np.array([found.get(pair, 0.0) for pair in pairs]) / np.sqrt(freedom)
        num_runs_T = np.array([len(by_seed) for by_seed in curve.losses])
        own = [teachers.index(teacher) for teacher in curve.teachers]
        widening_B = np.sqrt(freedom / chi2.ppf(uniform_B, freedom))
        moves_BT = weights_BUQ[:, own] @ residuals_Q / np.sqrt(num_runs_T)
        drawn.append(curve.means_T + moves_BT * widening_B[:, None])
    return drawn

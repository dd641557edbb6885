"""Student loss over teacher size: the runs of one student under one condition, and the conditions of a table."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from minima.errors import TableError
from minima.law.fit.checks import Run
from minima.law.sizes_text import short
from minima.law.table import DIRECT, INITIALISATIONS

Budget = Literal["tokens", "ratio"]


@dataclass(frozen=True)
class Condition:
    """What the students of one line have in common."""

    study: str  # as in the table
    family: str  # as in the table
    initialisation: str  # how the students start
    budget: float  # training tokens, or tokens per parameter of the student to two digits (`ratio`)
    epochs: float | None  # how often a token was seen, to two digits; None if the table does not say


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One student under one condition."""

    condition: Condition  # what it shares with other students
    student: str
    size: int  # its parameters
    tokens: int  # tokens that it was trained on
    teachers: tuple[str, ...]  # names, from the smallest to the largest
    sizes: tuple[int, ...]  # parameters of the teachers
    losses: tuple[dict[int, float], ...]  # for each teacher, the held-out loss by seed, nats per token
    # the loss by seed of the same student on the same tokens without a teacher; empty if there is none
    direct: dict[int, float]

    @property
    def means_T(self) -> np.ndarray:
        """Loss under each teacher, averaged over the seeds of the curve (see `effects`)."""
        return self.effects.means_T

    @property
    def seeds(self) -> list[int]:
        """All seeds of the curve."""
        return sorted({seed for by_seed in self.losses for seed in by_seed})

    @cached_property
    def effects(self) -> "Effects":
        """The losses split into the teachers' part, the seeds' common part, and residuals."""
        return _effects(self.losses, self.seeds)


@dataclass(frozen=True)
class Effects:
    """The losses of one curve as teacher + seed + residual, by least squares.

    If a teacher lacks a seed, plain means would mix that seed's common effect into the difference between two teachers;
    the additive model does not.
    """

    means_T: np.ndarray  # mean loss under each teacher over the seeds of the curve, nats per token
    rests: dict[tuple[int, int], float]  # residual of each run, by index of its teacher and by seed
    freedom: int  # degrees of freedom of the residuals; 0 if there are none
    paired: bool  # whether the seeds' common part was taken out, which needs runs that connect all teachers and seeds
    explained: float  # by how much the teachers' part reduces the sum of squared residuals


def _effects(losses: Sequence[dict[int, float]], seeds: Sequence[int]) -> Effects:
    runs = [(place, seed, loss) for place, by_seed in enumerate(losses) for seed, loss in by_seed.items()]
    num_teachers, num_seeds = len(losses), len(seeds)
    means_T = np.array([np.mean(list(by_seed.values())) for by_seed in losses])
    seed_effects = dict.fromkeys(seeds, 0.0)
    loss_R, without_R1 = np.array([loss for _, _, loss in runs]), np.ones((len(runs), 1))
    freedom, paired = len(runs) - num_teachers, False
    if num_seeds > 1 and num_teachers > 1:
        teacher_RT = np.array([[place == other for other in range(num_teachers)] for place, _, _ in runs], dtype=float)
        # The last seed's effect is minus the sum of the others', so that all add up to zero.
        seed_RS = np.array(
            [[float(seed == one) - float(seed == seeds[-1]) for one in seeds[:-1]] for _, seed, _ in runs]
        )
        design = np.hstack([teacher_RT, seed_RS])
        if np.linalg.matrix_rank(design) == design.shape[1] < len(runs):
            found = np.linalg.lstsq(design, loss_R, rcond=None)[0]
            without_R1 = np.hstack([without_R1, seed_RS])
            freedom, paired = len(runs) - design.shape[1], True
            means_T, by_seed_S = found[:num_teachers], [*found[num_teachers:], -found[num_teachers:].sum()]
            seed_effects = {seed: float(effect) for seed, effect in zip(seeds, by_seed_S, strict=True)}
    rests = {(place, seed): loss - float(means_T[place]) - seed_effects[seed] for place, seed, loss in runs}
    missed_R = loss_R - without_R1 @ np.linalg.lstsq(without_R1, loss_R, rcond=None)[0]
    explained = float((missed_R**2).sum()) - sum(rest**2 for rest in rests.values())
    return Effects(means_T, rests, freedom, paired, explained)


def two_digits(value: float) -> float:
    """Round a number to two significant digits."""
    return 0.0 if value == 0 else round(value, 1 - math.floor(math.log10(abs(value))))


def condition_of(run: Run, budget: Budget) -> Condition:
    """The condition that a run belongs to."""
    amount = float(run.tokens) if budget == "tokens" else two_digits(run.tokens / run.student_size)
    epochs = None if run.epochs is None else two_digits(run.epochs)
    return Condition(run.study, run.family, run.initialisation, amount, epochs)


def curves_of(runs: Sequence[Run], budget: Budget) -> dict[Condition, list[Curve]]:
    """The curves of a table by condition, students from the smallest to the largest.

    Args:
        budget: when two students have the same token budget: with equal tokens, or equal tokens per parameter.
    """
    cells: dict[Condition, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        cells[condition_of(run, budget)][run.student].append(run)
    found: dict[Condition, list[Curve]] = {}
    for condition in sorted(cells, key=_order):
        if condition.initialisation == DIRECT:
            continue
        alone = cells.get(replace(condition, initialisation=DIRECT), {})
        curves = [_curve(condition, own, alone.get(student, [])) for student, own in cells[condition].items()]
        found[condition] = sorted(curves, key=lambda curve: curve.size)
    return found


def _order(condition: Condition) -> tuple:
    epochs = condition.epochs or 0.0
    return condition.study, condition.family, condition.budget, epochs, INITIALISATIONS.index(condition.initialisation)


def _curve(condition: Condition, runs: Sequence[Run], direct: Sequence[Run]) -> Curve:
    sizes = {run.teacher: run.teacher_size for run in runs}
    teachers = sorted(sizes, key=lambda name: (sizes[name], name))
    if len({(run.teacher, run.seed) for run in runs}) < len(runs):
        raise TableError(
            f"student {runs[0].student} has two runs with the same teacher and seed under one condition "
            f"(rows {', '.join(str(run.number) for run in runs[:6])}{', ...' if len(runs) > 6 else ''})",
            "budgets that agree to two digits count as the same, so one of the runs would be lost",
            "fit with `--budget tokens`, or give nearly equal budgets a study of their own",
        )
    losses = [{run.seed: run.loss for run in runs if run.teacher == teacher} for teacher in teachers]
    first = runs[0]
    return Curve(
        condition=condition,
        student=first.student,
        size=first.student_size,
        tokens=first.tokens,
        teachers=tuple(teachers),
        sizes=tuple(sizes[teacher] for teacher in teachers),
        losses=tuple(losses),
        direct={run.seed: run.loss for run in direct if run.tokens == first.tokens},
    )


def describe(condition: Condition, budget: Budget) -> str:
    """A condition in one line."""
    amount = f"{short(condition.budget)} tokens" if budget == "tokens" else f"{condition.budget:g} tokens per parameter"
    count = condition.epochs
    epochs = "" if count is None else f", {count:g} epoch{'' if count == 1 else 's'}"
    return with_names(condition.study, condition.family, f"{condition.initialisation}, {amount}{epochs}")


def with_names(study: str, family: str, text: str) -> str:
    """A text about runs after the names of their study and family, which a table may leave empty."""
    names = " ".join(name for name in (study, family) if name)
    return f"{names}: {text}" if names else text


def gaps(conditions: dict[Condition, list[Curve]], budget: Budget) -> list[str]:
    """What a grid lacks, one line each: seeds, teachers and students that others of the same budget have, single seeds,
    direct runs, and runs that are separated by a budget that is nearly the same.
    """
    notes: list[str] = []
    for condition, curves in conditions.items():
        alike = [one for other, found in conditions.items() if _same_grid(condition, other) for one in found]
        notes += _gaps(condition, curves, alike, budget)
    listed = list(conditions)
    for place, one in enumerate(listed):
        for other in listed[place + 1 :]:
            if replace(one, budget=0.0, epochs=None) == replace(other, budget=0.0, epochs=None) and _nearly(one, other):
                notes.append(
                    f"{describe(one, budget)} ({_epochs(one)}) and {describe(other, budget)} ({_epochs(other)}) are "
                    "fitted separately, though their budgets are nearly the same: to fit them together, write the same "
                    "tokens and unique_tokens"
                )
    return notes


def _same_grid(one: Condition, other: Condition) -> bool:
    return replace(one, initialisation="") == replace(other, initialisation="")


def _nearly(one: Condition, other: Condition) -> bool:
    unknown = one.epochs is None or other.epochs is None
    epochs = unknown or abs((one.epochs or 0.0) - (other.epochs or 0.0)) <= 0.05 * (one.epochs or 0.0)
    return epochs and abs(one.budget - other.budget) <= 0.01 * one.budget


def _epochs(condition: Condition) -> str:
    return "epochs unknown" if condition.epochs is None else f"{condition.epochs:g} epochs"


def _gaps(condition: Condition, curves: Sequence[Curve], alike: Sequence[Curve], budget: Budget) -> list[str]:
    notes = []
    sizes = {name: size for curve in alike for name, size in zip(curve.teachers, curve.sizes, strict=True)}
    seeds = {seed for curve in alike for seed in curve.seeds}
    known_alone = any(curve.direct for curve in alike)
    here = describe(condition, budget)
    students = {curve.student: curve.size for curve in alike}
    absent = sorted(set(students) - {curve.student for curve in curves}, key=students.__getitem__)
    if absent:
        notes.append(f"{here}: no student {', '.join(absent)}, which other starts have")
    for curve in curves:
        where = f"{here}, student {curve.student}"
        if len(seeds) > 1:
            for teacher, by_seed in zip(curve.teachers, curve.losses, strict=True):
                without = sorted(seeds - set(by_seed))
                if without:
                    notes.append(f"{where}: no run with teacher {teacher} for seed {', '.join(map(str, without))}")
        if not curve.effects.paired and len(curve.seeds) > 1 and len(curve.teachers) > 1:
            notes.append(f"{where}: too few runs share seeds, so a seed's effect common to all teachers is not removed")
        absent = [name for name, size in sizes.items() if size > curve.size and name not in curve.teachers]
        if absent:
            notes.append(f"{where}: no run with teacher {', '.join(absent)}, which other students or starts have")
        if known_alone and sorted(curve.direct) != curve.seeds:
            have = ", ".join(map(str, sorted(curve.direct))) or "none"
            notes.append(f"{where}: direct runs with seeds: {have}, distilled: {', '.join(map(str, curve.seeds))}")
        elif curve.effects.paired and any(sorted(by_seed) != curve.seeds for by_seed in curve.losses):
            notes.append(f"{where}: not every teacher has every seed, so intervals over seeds are somewhat too narrow")
        same = [
            teacher
            for teacher, by_seed in zip(curve.teachers, curve.losses, strict=True)
            if len(set(by_seed.values())) < len(by_seed)
        ]
        if same:
            notes.append(f"{where}: seeds with the same loss to the last digit (teacher {', '.join(same)}): one run?")
    if len(seeds) == 1:
        notes.append(f"{here}: a single seed ({seeds.pop()}), so there are no intervals")
    return notes

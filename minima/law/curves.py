"""Student loss over teacher size: the runs of one student under one condition, and the conditions of a table."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from minima.errors import TableError
from minima.law.checks import Run
from minima.law.sizes_text import short
from minima.law.table import DIRECT, INITIALISATIONS

Budget = Literal["tokens", "ratio"]


@dataclass(frozen=True)
class Condition:
    """What the students of one line have in common.

    Attributes:
        study: as in the table.
        family: as in the table.
        initialisation: how the students start.
        budget: training tokens, or tokens per parameter of the student to two digits (`ratio`).
        epochs: how often a token was seen, to two digits; None where the table does not say.
    """

    study: str
    family: str
    initialisation: str
    budget: float
    epochs: float | None


@dataclass(frozen=True)
class Curve:
    """One student under one condition.

    Attributes:
        condition: what it shares with other students.
        student: its name.
        size: its parameters.
        tokens: that it was trained on.
        teachers: names, from the smallest to the largest.
        sizes: parameters of the teachers.
        losses: for each teacher the held-out loss by seed, nats per token.
        direct: the loss by seed of the same student on the same tokens without a teacher; empty where there is none.
    """

    condition: Condition
    student: str
    size: int
    tokens: int
    teachers: tuple[str, ...]
    sizes: tuple[int, ...]
    losses: tuple[dict[int, float], ...]
    direct: dict[int, float]

    @property
    def means_T(self) -> np.ndarray:
        """Mean loss for each teacher."""
        return np.array([np.mean(list(by_seed.values())) for by_seed in self.losses])

    @property
    def seeds(self) -> list[int]:
        """All seeds of the curve."""
        return sorted({seed for by_seed in self.losses for seed in by_seed})

    @property
    def paired(self) -> bool:
        """Whether every teacher has every seed, so that what a seed does to all teachers can be taken out."""
        return all(sorted(by_seed) == self.seeds for by_seed in self.losses)


def two_digits(value: float) -> float:
    """A number to two significant digits."""
    return 0.0 if value == 0 else round(value, 1 - math.floor(math.log10(abs(value))))


def condition_of(run: Run, budget: Budget) -> Condition:
    """The condition that a run belongs to."""
    amount = float(run.tokens) if budget == "tokens" else two_digits(run.tokens / run.student_size)
    epochs = None if run.epochs is None else two_digits(run.epochs)
    return Condition(run.study, run.family, run.initialisation, amount, epochs)


def curves_of(runs: Sequence[Run], budget: Budget) -> dict[Condition, list[Curve]]:
    """The curves of a table by condition, students from the smallest to the largest.

    Args:
        runs: that passed the checks.
        budget: what makes the token budget of two students the same: equal tokens, or equal tokens per parameter.
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
            "budgets count as the same to two digits, and one of the runs would be lost",
            "fit with `--budget tokens`, or give nearly equal budgets a study of their own",
        )
    losses = [{run.seed: run.loss for run in runs if run.teacher == teacher} for teacher in teachers]
    first = runs[0]
    return Curve(
        condition, first.student, first.student_size, first.tokens, tuple(teachers),
        tuple(sizes[teacher] for teacher in teachers), tuple(losses),
        {run.seed: run.loss for run in direct if run.tokens == first.tokens},
    )  # fmt: skip


def describe(condition: Condition, budget: Budget) -> str:
    """A condition in one line."""
    amount = f"{short(condition.budget)} tokens" if budget == "tokens" else f"{condition.budget:g} tokens per parameter"
    count = condition.epochs
    epochs = "" if count is None else f", {count:g} epoch{'' if count == 1 else 's'}"
    names = " ".join(name for name in (condition.study, condition.family) if name)
    return f"{names + ': ' if names else ''}{condition.initialisation}, {amount}{epochs}"


def gaps(condition: Condition, curves: Sequence[Curve], budget: Budget) -> list[str]:
    """What the grid of a condition lacks: seeds, and teachers that other students have."""
    notes = []
    sizes = {name: size for curve in curves for name, size in zip(curve.teachers, curve.sizes, strict=True)}
    seeds = {seed for curve in curves for seed in curve.seeds}
    for curve in curves:
        where = f"{describe(condition, budget)}, student {curve.student}"
        if len(seeds) > 1:
            for teacher, by_seed in zip(curve.teachers, curve.losses, strict=True):
                without = sorted(seeds - set(by_seed))
                if without:
                    notes.append(f"{where}: no run with teacher {teacher} for seed {', '.join(map(str, without))}")
        absent = [name for name, size in sizes.items() if size > curve.size and name not in curve.teachers]
        if absent:
            notes.append(f"{where}: no run with teacher {', '.join(absent)}, which other students have")
    if len(seeds) == 1:
        notes.append(f"{describe(condition, budget)}: a single seed ({seeds.pop()}); nothing has an interval")
    return notes

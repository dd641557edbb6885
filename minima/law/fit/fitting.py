"""Everything that `minima law fit` finds in a table, and the JSON that stores it."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from minima.disk import write_whole
from minima.disk_errors import disk_full_named
from minima.errors import TableError, first_line
from minima.law.fit.checks import Excluded, Run, Sizes, check_rows
from minima.law.fit.curves import Budget, Condition, Curve, condition_of, curves_of, describe, gaps, with_names
from minima.law.fit.interpolate import Minimum, minimum_of
from minima.law.fit.line import FEWEST_STUDENTS, Line, fit_line
from minima.law.fit.noise import draw_means
from minima.law.fit.scaling import ScalingLaw, Supervised
from minima.law.fit.scaling_fit import DESCENTS, Fitted, fit_distilled, fit_supervised, published_error
from minima.law.fit.teachers import order_notes
from minima.law.table import DIRECT, INITIALISATIONS, Row, read_table

FORMAT = "minima law fit 1"
DRAWS = 2000


@dataclass(frozen=True)
class ConditionFit:
    """The law of capacity gap under one condition: every student's curve and minimum, and the line."""

    condition: Condition
    curves: tuple[Curve, ...]
    minima: tuple[Minimum, ...]
    line: Line


@dataclass(frozen=True)
class ScalingFit:
    """The distillation scaling law on the runs of one initialisation."""

    study: str  # as in the table
    family: str  # as in the table
    initialisation: str  # the students' initialisation
    supervised: Fitted  # fit to the direct runs of the study and family
    distilled: Fitted  # fit to the runs of this initialisation
    published_error: float | None  # median relative error of the published coefficients on the same runs

    @property
    def name(self) -> str:
        """Which runs it is fitted to."""
        return with_names(self.study, self.family, self.initialisation)

    @property
    def law(self) -> ScalingLaw | None:
        """The fitted law; None unless both of its parts were fitted."""
        supervised, distilled = self.supervised.coefficients, self.distilled.coefficients
        if isinstance(supervised, Supervised) and distilled is not None and not isinstance(distilled, Supervised):
            return ScalingLaw(supervised, distilled)
        return None


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What was found in a table."""

    format: str
    table: str
    sha256: str  # SHA-256 of its bytes
    num_rows: int  # rows in it
    num_runs: int  # rows that were fitted
    sizes: Sizes  # which parameters count as size
    budget: Budget  # when two token budgets count as the same
    seed: int
    num_draws: int  # draws over seeds
    excluded: tuple[Excluded, ...]  # rows that were left out, with reasons
    notes: tuple[str, ...]  # what the table lacks
    conditions: tuple[ConditionFit, ...]  # the law of capacity gap
    scaling: tuple[ScalingFit, ...]  # the distillation scaling law

    @property
    def kind(self) -> str:
        """The kind of sizes, in words."""
        return "without embeddings" if self.sizes == "non_embedding" else "with embeddings"


_ADAPTER = TypeAdapter(Fit)


def fit_table(
    path: Path, sizes: Sizes = "non_embedding", budget: Budget = "tokens", seed: int = 0,
    num_draws: int = DRAWS, descents: int = DESCENTS,
) -> Fit:  # fmt: skip
    """Fit both laws to a table.

    Args:
        path: CSV or Parquet.
        budget: when two students have the same token budget.
        seed: seed of the draws; the same seed and table give the same fit.
        num_draws: draws over seeds.
        descents: number of starts from which a scaling law is minimised.

    Raises:
        TableError: the table cannot be read, or cannot be fitted as it is.
    """
    path = path.expanduser()
    rows = read_table(path)
    runs, excluded = check_rows(rows, sizes)
    conditions, notes = [], []
    by_condition = curves_of(runs, budget)
    notes += gaps(by_condition, budget)
    for condition, curves in by_condition.items():
        means = draw_means(curves, num_draws, seed)
        found = [minimum_of(curve, means_BT) for curve, means_BT in zip(curves, means, strict=True)]
        minima, sizes_SB = [minimum for minimum, _ in found], [sizes_B for _, sizes_B in found]
        conditions.append(ConditionFit(condition, tuple(curves), tuple(minima), fit_line(minima, sizes_SB)))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Fit(
        format=FORMAT,
        table=path.name,
        sha256=digest,
        num_rows=len(rows),
        num_runs=len(runs),
        sizes=sizes,
        budget=budget,
        seed=seed,
        num_draws=num_draws,
        excluded=tuple(excluded),
        notes=tuple(notes + order_notes(runs) + _remarks(rows, runs, conditions, sizes, budget)),
        conditions=tuple(conditions),
        scaling=tuple(_scaling(runs, descents)),
    )


def _remarks(
    rows: Sequence[Row], runs: Sequence[Run], conditions: Sequence[ConditionFit], sizes: Sizes, budget: Budget
) -> list[str]:
    notes = []
    few = [one for one in conditions if len(one.curves) < FEWEST_STUDENTS]
    students: dict[Condition, set[str]] = defaultdict(set)
    for run in (one for one in runs if one.teacher):
        students[condition_of(run, "ratio")].add(run.student)
    if budget == "tokens" and few and max(map(len, students.values())) >= FEWEST_STUDENTS:
        where = describe(few[0].condition, budget)
        advice = "with `--budget ratio` students of equal tokens per parameter share a line"
        notes.append(f"{where}: fewer than three students; {advice}")
    unknown = [run.number for run in runs if run.initialisation != DIRECT and run.teacher_loss is None]
    if unknown:
        shown = ", ".join(map(str, unknown[:8])) + (" and more" if len(unknown) > 8 else "")
        notes.append(
            f"{len(unknown)} runs have no teacher_loss above 0, so they are left out of the scaling law (rows {shown})"
        )
    if all(row.student_parameters == row.student_non_embedding_parameters for row in rows):
        notes.append("sizes with and without embeddings are the same in every row")
    if sizes == "all":
        notes.append("the scaling law is about sizes without embeddings, but these include them")
    return notes


def _scaling(runs: Sequence[Run], descents: int) -> list[ScalingFit]:
    families: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        families[run.study, run.family].append(run)
    found = []
    for (study, family), own in sorted(families.items()):
        supervised = fit_supervised(own, descents)
        known = supervised.coefficients if isinstance(supervised.coefficients, Supervised) else None
        for initialisation in INITIALISATIONS:
            part = [run for run in own if run.initialisation in (initialisation, DIRECT)]
            if initialisation != DIRECT and any(run.initialisation == initialisation for run in part):
                distilled = fit_distilled(part, known, descents)
                error = published_error(part)
                found.append(ScalingFit(study, family, initialisation, supervised, distilled, error))
    return found


def to_json(fit: Fit) -> str:
    """The fit as JSON, with every point of its curves."""
    return _ADAPTER.dump_json(fit, indent=1).decode() + "\n"


def write_fit(fit: Fit, path: Path) -> None:
    """Write the JSON atomically: a reader sees the old file or the new one."""
    with disk_full_named(path.parent):
        write_whole(path, to_json(fit))


def read_fit(path: Path) -> Fit:
    """Read a fit from its JSON.

    Raises:
        TableError: the file cannot be read, or was not written by `minima law fit`.
    """
    path = path.expanduser()
    try:
        fit = _ADAPTER.validate_json(path.read_bytes())
        problem = None if fit.format == FORMAT else f"its format is {fit.format!r}"
    except (OSError, ValidationError) as error:
        problem = first_line(error)
    if problem is not None:
        raise TableError(
            f"{path} cannot be read as a fit: {problem}",
            "without it, nothing about your own models can be shown or drawn",
            "write it with `minima law fit TABLE --output FILE`",
        )
    return fit

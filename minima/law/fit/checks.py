"""Check which rows of a table can be fitted together.

A table is refused if every fit to it would be wrong (sizes of two kinds, one name for two shapes, two vocabularies, a
single teacher). A row that is faulty by itself is left out and reported with its reason. Nothing is filled in.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from minima.errors import TableError
from minima.law.table import DIRECT, Row

Sizes = Literal["non_embedding", "all"]
_SAME_LOSS = 1e-3  # relative
_COLUMN = {"non_embedding": "non_embedding_parameters", "all": "parameters"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A row that can be fitted, with sizes of the requested kind."""

    number: int  # number of the row in its table, from 1
    study: str  # as in the table
    family: str  # as in the table
    initialisation: str  # as in the table
    student: str
    student_size: int  # its parameters
    teacher: str  # name of the teacher; empty for `direct`
    teacher_size: int  # its parameters; 0 for `direct`
    tokens: int  # tokens that the student was trained on
    epochs: float | None  # tokens / unique tokens; None if the table does not say
    seed: int
    loss: float  # held-out loss, nats per token
    teacher_loss: float | None  # the teacher's held-out loss, nats per token; None if the table does not say


@dataclass(frozen=True)
class Excluded:
    """A row that is left out of the fit: its number from 1, which run it is, and why."""

    row: int
    run: str
    reason: str


def check_rows(rows: Sequence[Row], sizes: Sizes) -> tuple[list[Run], list[Excluded]]:
    """Split a table into the runs that can be fitted and the rows that are left out.

    Args:
        sizes: which parameters count as size: those without embeddings, or all.

    Raises:
        TableError: sizes with and without embeddings are mixed, or those asked for are missing; a name has two sizes; a
            family has two vocabularies; a run occurs twice with different losses; nothing is left; or what is left has
            a single teacher.
    """
    _check_sizes(rows, sizes)
    _check_names(rows)
    runs: list[Run] = []
    excluded = []
    seen: dict[tuple, Run] = {}
    for number, row in enumerate(rows, start=1):
        reason = _fault(row, sizes)
        if reason is None:
            run = _run(row, number, sizes)
            key = (run.study, run.family, run.initialisation, run.student, run.teacher, run.tokens, run.epochs)
            other = seen.setdefault((*key, run.seed), run)
            if other is run:
                runs.append(run)
            elif other.loss == run.loss:
                reason = f"it repeats row {other.number}"
            else:
                raise TableError(
                    f"rows {other.number} and {number} are the same run ({row.describe()}) with losses {other.loss} "
                    f"and {run.loss}",
                    "it is not known which of the two is right, and their mean is not a run",
                    "remove one of them, or give it another study name",
                )
        if reason is not None:
            excluded.append(Excluded(number, row.describe(), reason))
    _check_teachers(runs, excluded)
    _check_teacher_losses(runs)
    return runs, excluded


def _size(row: Row, model: str, sizes: Sizes) -> int | None:
    return getattr(row, f"{model}_{_COLUMN[sizes]}")


def _fault(row: Row, sizes: Sizes) -> str | None:
    """Why a row cannot be fitted; None if it can."""
    for name in ("student", "initialisation", "tokens", "seed", "student_loss"):
        if getattr(row, name) in ("", None):
            return f"{name} is missing"
    loss, student, teacher = row.student_loss, _size(row, "student", sizes), _size(row, "teacher", sizes)
    assert loss is not None
    if not math.isfinite(loss):
        return f"student_loss is {loss}"
    if loss <= 0:
        return f"student_loss is {loss}; a cross-entropy of text is positive"
    if row.vocabulary_size and loss > math.log(row.vocabulary_size):
        chance = math.log(row.vocabulary_size)
        return f"student_loss is {loss:.4g}, more than the {chance:.4g} nats of guessing: diverged, or not in nats"
    if row.tokens is not None and row.tokens <= 0:
        return f"tokens is {row.tokens}"
    if row.tokens is not None and row.unique_tokens is not None and row.unique_tokens > row.tokens:
        return f"unique_tokens is {row.unique_tokens:,}, more than all {row.tokens:,} tokens"
    if row.epochs and row.tokens and row.unique_tokens and abs(row.epochs * row.unique_tokens / row.tokens - 1) > 0.02:
        return f"epochs is {row.epochs:g}, but tokens / unique_tokens is {row.tokens / row.unique_tokens:.3g}"
    if student is None:
        return f"student_{_COLUMN[sizes]} is missing"
    if row.initialisation == DIRECT:
        return f"direct means no teacher, but {row.teacher} is named" if row.teacher else None
    if not row.teacher:
        return "teacher is missing"
    if teacher is None:
        return f"teacher_{_COLUMN[sizes]} is missing"
    if student >= teacher:
        return f"the student ({student:,} parameters) is not smaller than its teacher ({teacher:,})"
    return None


def _run(row: Row, number: int, sizes: Sizes) -> Run:
    student = _size(row, "student", sizes)
    assert row.tokens is not None and row.seed is not None and row.student_loss is not None and student is not None
    known = row.teacher_loss is not None and math.isfinite(row.teacher_loss) and row.teacher_loss > 0
    return Run(
        number=number,
        study=row.study,
        family=row.family,
        initialisation=row.initialisation,
        student=row.student,
        student_size=student,
        teacher=row.teacher,
        teacher_size=_size(row, "teacher", sizes) or 0,
        tokens=row.tokens,
        epochs=row.tokens / row.unique_tokens if row.unique_tokens else row.epochs,
        seed=row.seed,
        loss=row.student_loss,
        teacher_loss=row.teacher_loss if known else None,
    )


def _check_sizes(rows: Sequence[Row], sizes: Sizes) -> None:
    whole = [(number, row) for number, row in enumerate(rows, start=1) if row.student]
    alike: dict[str, bool | None] = {}
    for model in ("student", "teacher"):
        own = [(number, row) for number, row in whole if model == "student" or row.teacher]
        for column in _COLUMN.values():
            without = [number for number, row in own if getattr(row, f"{model}_{column}") is None]
            if without and len(without) < len(own):
                _refuse_mixed(f"{model}_{column} is missing in {_numbers(without)} but given in others")
            if without and column == _COLUMN[sizes]:
                other = "all" if sizes == "non_embedding" else "non_embedding"
                raise TableError(
                    f"{model}_{column} is given in no row",
                    "a law is a statement about sizes",
                    f"add it, or fit the other sizes with `--sizes {other}`",
                )
        pairs = [(number, _size(row, model, "all"), _size(row, model, "non_embedding")) for number, row in own]
        both = [(number, everything, inner) for number, everything, inner in pairs if everything and inner]
        smaller = [number for number, everything, inner in both if everything < inner]
        if smaller:
            _refuse_mixed(f"{model}_parameters is less than {model}_non_embedding_parameters in {_numbers(smaller)}")
        same = [number for number, everything, inner in both if everything == inner]
        if same and len(same) < len(both):
            _refuse_mixed(f"{model}_parameters excludes embeddings in {_numbers(same)} and not in others")
        alike[model] = bool(same) if both else None
        few = [
            number
            for number, everything, inner in both
            if 0 < everything - inner < (rows[number - 1].vocabulary_size or 0)
        ]
        if few:
            _refuse_mixed(f"the two sizes of the {model} differ by less than one number per token in {_numbers(few)}")
        for number, everything, inner in pairs:
            if (everything is not None and everything <= 0) or (inner is not None and inner <= 0):
                raise TableError(
                    f"row {number}: a {model} of {min(everything or 0, inner or 0):,} parameters",
                    "sizes are fitted on a logarithmic scale, so they must be above 0",
                    "write the full number of parameters, not millions or thousands",
                )

    if None not in alike.values() and alike["student"] != alike["teacher"]:
        plain, other = ("student", "teacher") if alike["student"] else ("teacher", "student")
        _refuse_mixed(f"{plain}_parameters excludes embeddings, but {other}_parameters includes them")


def _refuse_mixed(what: str) -> None:
    raise TableError(
        f"sizes with and without embeddings are mixed: {what}",
        "for small models the two differ by a factor, so one line through both means nothing",
        "count all models in the same way and fill in both columns for every row",
    )


def _check_names(rows: Sequence[Row]) -> None:
    def one_value(what: str, why: str, do: str, key: Callable[[Row], tuple], value: Callable[[Row], tuple]) -> None:
        found: dict[tuple, dict[tuple, int]] = defaultdict(dict)
        for number, row in enumerate(rows, start=1):
            found[key(row)].setdefault(value(row), number)
        for name, values in found.items():
            if len(values) > 1:
                shown = "; ".join(f"{_plain(seen)} in row {number}" for seen, number in values.items())
                raise TableError(f"{what} {name[-1] or 'without a name'}: {shown}", why, do)

    why = "runs are grouped by the names of their models"
    do = "give each shape a name of its own, or give its study or family another name"
    one_value(
        "two sizes of the student", why, do, lambda row: (row.study, row.family, "student", row.student),
        lambda row: (row.student_parameters, row.student_non_embedding_parameters),
    )  # fmt: skip
    one_value(
        "two sizes of the teacher", why, do, lambda row: (row.study, row.family, "teacher", row.teacher),
        lambda row: (row.teacher_parameters, row.teacher_non_embedding_parameters),
    )  # fmt: skip
    one_value(
        "two vocabularies in the family",
        "losses in nats per token of different tokenizers cannot be compared",
        "give the models of each tokenizer a family of their own",
        lambda row: (row.study, row.family),
        lambda row: (row.vocabulary_size,),
    )


def _check_teachers(runs: Sequence[Run], excluded: Sequence[Excluded]) -> None:
    reasons = "; ".join(f"row {one.row}: {one.reason}" for one in excluded[:5]) or "no row has a teacher"
    teachers = {run.teacher for run in runs if run.teacher}
    if not teachers:
        raise TableError(f"no distilled run can be fitted ({reasons})", "there is nothing to fit", "correct the table")
    if len(teachers) == 1:
        raise TableError(
            f"a single teacher, {teachers.pop()}",
            "to find the best teacher, several must be compared; a minimum takes at least three",
            "distil the same students from at least three teachers, better five",
        )


def _check_teacher_losses(runs: Sequence[Run]) -> None:
    """Refuse two losses for one teacher and seed, unless they differ only by rounding in different batches."""
    seen: dict[tuple, Run] = {}
    for run in (one for one in runs if one.teacher and one.teacher_loss is not None):
        first = seen.setdefault((run.study, run.family, run.teacher, run.seed), run)
        assert run.teacher_loss is not None and first.teacher_loss is not None
        if abs(run.teacher_loss / first.teacher_loss - 1) > _SAME_LOSS:
            raise TableError(
                f"rows {first.number} and {run.number}: teacher {run.teacher} of seed {run.seed} has losses "
                f"{first.teacher_loss:.6g} and {run.teacher_loss:.6g}",
                "students of two teachers would be compared as if they had one",
                "correct the loss, or give the teachers different names",
            )


def _numbers(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:8])
    return f"row{'s' if len(numbers) > 1 else ''} {shown}{' and more' if len(numbers) > 8 else ''}"


def _plain(values: tuple) -> str:
    return " / ".join("none" if value is None else f"{value:,}" for value in values)

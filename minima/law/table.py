"""The table of a study: one row per finished student run, as CSV and as Parquet.

Both files hold the same columns in the same order. A cell without a value is empty (null in Parquet). Reading checks
single cells; whether rows belong together is checked when they are fitted (`minima/law/fit/checks.py`).
"""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from minima.disk import write_whole
from minima.disk_errors import disk_full_named
from minima.errors import TableError

INITIALISATIONS = ("pruned_from_teacher", "pruned_from_fixed", "random", "direct")
DIRECT = "direct"


@dataclass(frozen=True)
class Row:
    """One finished student run."""

    study: str  # name of the study; rows of different studies are never fitted together
    family: str  # what its models have in common: architecture, tokenizer, held-out text
    vocabulary_size: int | None  # entries of the tokenizer; losses per token are only comparable within one vocabulary
    student: str  # name of the student's shape, the same in all its runs
    student_parameters: int | None  # all parameters, embeddings included; a tied head counts once
    student_non_embedding_parameters: int | None  # those of the layers and the final norm
    teacher: str  # name of the teacher's shape; empty for `direct`
    teacher_parameters: int | None  # the teacher's, counted like the student's; None for `direct`
    teacher_non_embedding_parameters: int | None  # the teacher's, counted like the student's; None for `direct`
    initialisation: str  # `pruned_from_teacher`, `pruned_from_fixed`, `random`, or `direct`: the hard loss alone
    tokens: int | None  # tokens that the student was trained on, repetitions included
    unique_tokens: int | None  # number of different ones among them
    epochs: float | None  # tokens / unique_tokens
    seed: int | None  # seed of the student's run and of its teacher's training
    student_loss: float | None  # held-out cross-entropy of the student, nats per token
    student_bits_per_byte: float | None = None  # the same loss, bits per byte of the text
    teacher_loss: float | None = None  # held-out cross-entropy of the teacher, nats per token
    teacher_bits_per_byte: float | None = None  # the same loss, bits per byte of the text
    kl: float | None = None  # KL(teacher || student) on the held-out text, nats per token
    flops: float | None = None  # FLOPs of the student's run, including the teacher's forward passes
    teacher_flops: float | None = None  # FLOPs of training the teacher
    seconds: float | None = None  # duration of the student's run

    def describe(self) -> str:
        """Which run this is, for a message."""
        tokens = "an unknown number of" if self.tokens is None else f"{self.tokens:,}"
        return (
            f"student {self.student or '?'}, teacher {self.teacher or 'none'}, {self.initialisation or '?'}, "
            f"{tokens} tokens, seed {'?' if self.seed is None else self.seed}"
        )


COLUMNS = tuple(field.name for field in fields(Row))
_KINDS = {name: (get_args(hint) or (hint,))[0] for name, hint in get_type_hints(Row).items()}


def write_table(rows: Iterable[Row], *paths: Path) -> None:
    """Write the same rows to each path, as CSV or Parquet by its suffix, atomically.

    Raises:
        TableError: the suffix is neither `.csv` nor `.parquet`.
        DiskFull: there is no space left.
    """
    rows = list(rows)
    for path in paths:
        with disk_full_named(path.parent):
            write_whole(path, _csv(rows) if _suffix(path) == ".csv" else _parquet(rows))


def read_table(path: Path) -> list[Row]:
    """Read the rows of a CSV or Parquet table, in the file's order. Unknown columns are ignored.

    Raises:
        TableError: the file cannot be read, lacks a column or has no rows, a cell has the wrong type, or an
            initialisation is not one of the four.
    """
    path = path.expanduser()
    try:
        names, records = _read_csv(path) if _suffix(path) == ".csv" else _read_parquet(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TableError(
            f"{path} cannot be read: {error}",
            "there is nothing to fit",
            "give the CSV or Parquet table that `minima law study` wrote, or one with its columns",
        ) from None
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise TableError(
            f"{path} has no column {', '.join(missing)}",
            "what is not known about a run cannot be checked, and runs that do not belong together would be mixed",
            "add the column, with empty cells where a value is not known; docs/law.md lists all of them",
        )
    if not records:
        raise TableError(f"{path} has no rows", "there is nothing to fit", "wait until some runs have finished")
    return [_row(record, number, path) for number, record in enumerate(records, start=1)]


def _suffix(path: Path) -> str:
    if path.suffix.lower() not in (".csv", ".parquet"):
        raise TableError(
            f"the table {path} ends in neither .csv nor .parquet",
            "its format is recognised by its name",
            "rename it, or write it as one of the two",
        )
    return path.suffix.lower()


def _row(record: dict[str, Any], number: int, path: Path) -> Row:
    values = {name: _value(name, record[name], number, path) for name in COLUMNS}
    if values["initialisation"] not in (*INITIALISATIONS, ""):
        raise TableError(
            f"{path}, row {number}: initialisation {values['initialisation']!r}",
            "students that start differently are fitted separately, so each row must say how its student started",
            f"write one of {', '.join(INITIALISATIONS)}",
        )
    return Row(**values)


def _value(name: str, cell: Any, number: int, path: Path) -> Any:
    kind = _KINDS[name]
    if kind is str:
        return "" if cell is None else str(cell).strip()
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return None
    try:
        value = float(cell)
        if kind is float or math.isnan(value):
            return value if kind is float else None
        if not value.is_integer():
            raise ValueError
        return int(cell) if isinstance(cell, int) or (isinstance(cell, str) and _is_digits(cell)) else int(value)
    except (TypeError, ValueError, OverflowError):
        raise TableError(
            f"{path}, row {number}: {name} is {cell!r}",
            f"it must be a {'whole ' if kind is int else ''}number, or a guess would be fitted",
            "correct the cell, or leave it empty if the value is not known",
        ) from None


def _is_digits(cell: str) -> bool:
    return cell.strip().lstrip("+-").isdigit()


def _text(name: str, value: Any) -> str:
    return "" if value is None else str(_KINDS[name](value))  # numpy's floats would show as np.float64(...)


def _read_csv(path: Path) -> tuple[Sequence[str], list[dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        records = list(reader)
        ragged = [number for number, record in enumerate(records, 1) if None in record or None in record.values()]
        if ragged:
            raise csv.Error(f"row {ragged[0]} does not have as many cells as the header")
        return reader.fieldnames or [], records


def _read_parquet(path: Path) -> tuple[Sequence[str], list[dict[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise OSError(str(error)) from None
    return table.column_names, table.to_pylist()


def _csv(rows: list[Row]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([_text(name, getattr(row, name)) for name in COLUMNS] for row in rows)
    return text.getvalue()


def _parquet(rows: list[Row]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    types = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
    columns = {name: pyarrow.array([getattr(row, name) for row in rows], types[_KINDS[name]]) for name in COLUMNS}
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()

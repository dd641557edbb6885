"""The results of a study: its table of finished cells, and an overview of what is done, running and left."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from minima.law.study.grid import CELLS, CORPUS, DATA, QUALITY, STUDENT, TEACHER, Unit, sequence_length, teacher_name
from minima.law.study.recipe import Study
from minima.law.study.worker_pool import Tally
from minima.law.table import Row, write_table
from minima.report.tables import text_table
from minima.stages.manifest import is_finished, read_manifest

CSV, PARQUET, OVERVIEW = "results.csv", "results.parquet", "overview.txt"


def collect(study: Study, units: Sequence[Unit]) -> list[Row]:
    """Write the table of the finished cells, as CSV and as Parquet, and return its rows."""
    rows = [_row(study, units, unit) for unit in units if unit.level == CELLS and unit.is_done()]
    if rows:
        write_table(rows, study.folder / CSV, study.folder / PARQUET)
    return rows


def _row(study: Study, units: Sequence[Unit], unit: Unit) -> Row:
    cell, length = unit.cell, sequence_length(units)
    assert cell is not None
    corpus = read_manifest(study.folder / DATA / CORPUS / CORPUS)
    trained, quality = read_manifest(unit.folder / STUDENT), read_manifest(unit.folder / QUALITY)
    shape, scores = study.shape_of(cell.student), quality["metrics"][STUDENT]
    tokens, unique = trained["metrics"]["tokens"], corpus["metrics"]["tokens"]
    flops = shape.training_flops_per_token(length) * tokens
    own: dict = {"teacher_parameters": None, "teacher_non_embedding_parameters": None}
    if cell.teacher is not None:
        teacher, folder = study.shape_of(cell.teacher), study.folder / teacher_name(cell.teacher, cell.seed)
        scored = read_manifest(folder / QUALITY)["metrics"][TEACHER]
        flops += teacher.forward_flops_per_token(length) * tokens
        seen = read_manifest(folder / TEACHER)["metrics"]["tokens"]
        own = {
            "teacher_parameters": teacher.parameters,
            "teacher_non_embedding_parameters": teacher.non_embedding_parameters,
            "teacher_loss": scored["loss"],
            "teacher_bits_per_byte": scored["bits_per_byte"],
            "teacher_flops": teacher.training_flops_per_token(length) * seen,
            "kl": scores["kl"],
        }
    return Row(
        study=study.name,
        family=f"{shape.family}, corpus {corpus['identity'][:12]}",
        vocabulary_size=shape.vocabulary_size,
        student=cell.student,
        student_parameters=shape.parameters,
        student_non_embedding_parameters=shape.non_embedding_parameters,
        teacher=cell.teacher or "",
        initialisation=cell.initialisation,
        tokens=tokens,
        unique_tokens=min(tokens, unique),
        epochs=tokens / min(tokens, unique),
        seed=cell.seed,
        student_loss=scores["loss"],
        student_bits_per_byte=scores["bits_per_byte"],
        flops=flops,
        seconds=trained["seconds"],
        **own,
    )


def overview(study: Study, units: Sequence[Unit], tally: Tally) -> str:
    """The grid as a table: for each student, start and budget, the mean held-out loss under each teacher.

    A cell whose seeds are not all finished shows how many are in its mean. `*`: being trained; `!`: failed.
    """
    done, running, failed = len(tally.done), len(tally.running), len(tally.failed)
    lines = [f"{study.name}: {done} runs done, {running} running, {len(units) - done - running - failed} left"]
    lines[0] += f", {failed} failed" if failed else ""
    headers = ["student", "start", "tokens", *study.teachers, "no teacher"]
    teachers = [
        _loss_text([unit for unit in units if unit.teacher and unit.teacher[0] == t], tally) for t in study.teachers
    ]
    rows: list[list[str]] = [["(teachers' own)", "", "", *teachers, ""]]
    cells: dict[tuple, list[Unit]] = defaultdict(list)
    for unit in units:
        if (cell := unit.cell) is not None:
            cells[cell.student, cell.initialisation, cell.tokens, cell.teacher].append(unit)
    for student, start, tokens in product(study.students, study.initialisations, study.tokens):
        shown = [_loss_text(cells[student, start, tokens, t], tally) for t in (*study.teachers, None)]
        if any(shown):
            rows.append([student, start, f"{tokens:,}", *shown])
    lines += ["", text_table(rows, headers), "", tally.startup_line()]
    lines += [f"failed: {name}: {reason}" for name, reason in tally.failed.items()]
    return "\n".join(lines) + "\n"


def _loss_text(units: Sequence[Unit], tally: Tally) -> str:
    if not units:
        return ""
    losses = [_loss(unit) for unit in units if unit.name in tally.done]
    mark = "*" * any(unit.name in tally.running for unit in units) + "!" * any(u.name in tally.failed for u in units)
    if not losses:
        return mark or "."
    mean = f"{sum(losses) / len(losses):.4f}"
    return f"{mean}{mark}" if len(losses) == len(units) else f"{mean} ({len(losses)}/{len(units)}){mark}"


def _loss(unit: Unit) -> float:
    folder: Path = unit.folder / QUALITY
    assert is_finished(folder)
    return read_manifest(folder)["metrics"][TEACHER if unit.teacher else STUDENT]["loss"]

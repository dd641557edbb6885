"""`minima status`: shows a run's stages, jobs, progress and failures. No torch; Slurm only where there is one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minima.cluster import slurm
from minima.cluster.failure import cell_failure, failure
from minima.cluster.jobs import Job
from minima.cluster.progress import progress
from minima.cluster.queued import lost_jobs
from minima.cluster.runs import look_up, newest_jobs, open_run
from minima.errors import ClusterError
from minima.recipe.schema import AnyStage, Recipe
from minima.report.progress import duration
from minima.report.run_table import number
from minima.report.tables import text_table
from minima.stages.manifest import STARTED, is_finished

_HEADERS = ("stage", "kind", "state", "job", "slurm", "step", "tokens", "loss", "tokens/s", "left", "checkpoint")
_RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING", "SIGNALING", "STAGE_OUT", "STOPPED", "RESIZING")
_GONE = "gone"
_FAILED = ("failed", "begun")  # a stage in such a state may have left a reason


def status(run: str, write: Callable[[str], None]) -> int:
    """Report the state of a run.

    Args:
        run: its folder, or its recipe.

    Returns:
        0, or 1 if a stage has failed.

    Raises:
        MinimaError: there is no such run.
    """
    recipe, folder = open_run(run)
    submitted = newest_jobs(folder)
    silent = None
    try:
        if slurm.is_here():
            submitted = newest_jobs(folder, lost_jobs(folder))
        known = look_up([job for jobs in submitted.values() for job in jobs])
    except ClusterError as error:  # what the folders say is still true
        known, silent = {}, error
    asked = slurm.is_here() and silent is None
    rows, reasons = [], []
    for stage in recipe.stages:
        jobs = submitted.get(stage.name, [])
        state, slurm_state = _state(folder / stage.name, jobs, known, bool(submitted), asked)
        rows.append(_row(recipe, stage, folder, jobs, state, slurm_state))
        lines = _reasons(folder, stage.name, jobs) if state in _FAILED else []
        if not lines and slurm_state == _GONE:
            ids = ", ".join(job.id for job in jobs)
            lines = [f"Slurm no longer knows job {ids}, and no log says why it ended: submit again"]
        if lines:
            reasons.append("\n".join([f"{stage.name} failed:", *_indented(lines)]))
    cells = _cell_rows(recipe, folder, submitted.get("cells", []), known, asked)
    if not cells or any(row[2] != "not submitted" for row in rows):
        write(text_table(rows, _HEADERS))
    if cells:
        write(text_table(cells, ("cell", "state", "job", "slurm", "finished")))
    for name, state, task, *_ in cells:
        if state == "failed":
            lines = [*cell_failure(folder, name, task), f"its logs are in {folder / 'cells' / name / 'logs'}"]
            reasons.append("\n".join([f"{name} failed:", *_indented(lines)]))
    for reason in reasons:
        write(f"\n{reason}")
    if silent is not None:
        write(f"\nthe jobs' states in Slurm are missing: {silent.what}")
    write(f"\nlogs are in {folder / 'logs'}")
    return 1 if any(row[2] == "failed" for row in rows) or any(row[1] == "failed" for row in cells) else 0


def _reasons(folder: Path, stage: str, jobs: Sequence[Job]) -> list[str]:
    """The failure lines of a stage's first job that has any; an array's parts come before the merge."""
    ids: list[str | None] = [job.id for job in jobs] if jobs else [None]
    return next((lines for job in ids if (lines := failure(folder, stage, job))), [])


def _state(
    folder: Path, jobs: Sequence[Job], known: dict[str, list[slurm.Task]], submitted: bool, asked: bool
) -> tuple[str, str]:
    """A stage's state, and its tasks' states in Slurm."""
    tasks = [task for job in jobs for task in known.get(job.id, [])]
    words = ", ".join(sorted({_words(task) for task in tasks}))
    if is_finished(folder):
        return "finished", words
    if any(task.state in _RUNNING for task in tasks):
        return "running", words
    if any(task.active for task in tasks):
        again = any(slurm.restarts(task.job) for task in tasks if task.active)
        return ("requeued" if again or any("REQUEUE" in task.state for task in tasks) else "pending"), words
    begun = (folder / STARTED).is_file()
    if not jobs:
        return ("begun" if begun else "not submitted" if submitted else "not begun"), words
    if not asked:
        return "submitted", "not known" if slurm.is_here() else "no Slurm here"
    return _end_state(tasks), words or _GONE


def _end_state(tasks: Sequence[slurm.Task]) -> str:
    """The state of an unfinished stage whose tasks ended: `cancelled` only if all of the incomplete ones were."""
    states = [task.state for task in tasks if task.state != "COMPLETED"]
    return "cancelled" if states and all(state.startswith("CANCELLED") for state in states) else "failed"


def _words(task: slurm.Task) -> str:
    plain = task.reason in ("", "None", "N/A")
    return task.state if plain else f"{task.state} ({task.reason})"


def _row(recipe: Recipe, stage: AnyStage, folder: Path, jobs: Sequence[Job], state: str, slurm_state: str) -> list[Any]:
    found = progress(recipe, stage, folder)
    step = "" if found.step is None else f"{found.step:,}" + (f"/{found.steps:,}" if found.steps else "")
    left = found.seconds_left if state in ("running", "requeued", "pending", "begun") else None
    return [
        stage.name,
        stage.kind,
        state,
        ", ".join(job.id for job in jobs),
        slurm_state,
        step,
        "" if found.tokens is None else f"{found.tokens:,}",
        "" if found.loss is None else number(found.loss),
        "" if found.tokens_per_second is None else f"{found.tokens_per_second:,.0f}",
        "" if left is None else duration(left),
        "" if found.checkpoint_step is None else f"step {found.checkpoint_step:,}",
    ]


def _cell_rows(
    recipe: Recipe, folder: Path, jobs: Sequence[Job], known: dict[str, list[slurm.Task]], asked: bool
) -> list[list[Any]]:
    newest = {name: (job, int(index)) for job in jobs for index, name in job.cells.items()}
    tasks = {(task.job, task.index): task for job in jobs for task in known.get(job.id, [])}
    rows = []
    for name, (job, index) in newest.items():
        own, task = folder / "cells" / name, tasks.get((job.id, index))
        done = [stage.name for stage in recipe.stages if is_finished(own / stage.name)]
        if len(done) == len(recipe.stages):
            state = "finished"
        elif task is not None and task.active:
            state = "running" if task.state in _RUNNING else "pending"
        elif job.stages and set(job.stages) <= set(done):
            state = "begun"  # its job was for these stages only
        elif not asked:
            state = "submitted"
        else:
            state = _end_state([task] if task else [])
        words = _words(task) if task else _GONE if state == "failed" else ""
        rows.append([name, state, f"{job.id}_{index}", words, f"{len(done)}/{len(recipe.stages)}"])
    return rows


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]

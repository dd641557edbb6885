"""A run's jobs in Slurm's queue: which may still succeed, and whether they match the current recipe."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from minima.cluster import slurm
from minima.cluster.jobs import Job, add_job, read_jobs, read_submission
from minima.cluster.recipe_copy import own_jsons
from minima.cluster.render import quoted
from minima.errors import ClusterError, MinimaError, StageError
from minima.recipe.distillation import PLACING
from minima.recipe.loading import load_recipe
from minima.recipe.schema import AnyStage, Recipe
from minima.stages.identity import check_unchanged, describe, free_keys
from minima.stages.manifest import is_begun, is_finished

_SHOWN_LETTERS = 80


def queued_tasks(run_folder: Path, dry_run: bool, write: Callable[[str], None]) -> list[tuple[Job, slurm.Task]]:
    """The run's waiting and running tasks, each with its job, without jobs that will never start.

    Args:
        dry_run: return nothing, with a warning, if Slurm does not answer.

    Raises:
        ClusterError: Slurm does not answer, so that a job might be submitted twice.
    """
    if not dry_run:
        adopt_lost(run_folder, write)
    jobs = {job.id: job for job in read_jobs(run_folder)}
    if not jobs or (dry_run and not slurm.is_here()):
        return []
    try:
        tasks = slurm.tasks([(job.id, job.name) for job in jobs.values()], ended=True)
    except ClusterError as error:
        if not dry_run:
            raise
        write(f"warning: earlier jobs are not checked: {error.what}")
        return []
    found = [(jobs[task.job], task) for task in tasks]
    doomed = _doomed(found)
    for job in {job.id: job for job, task in found if task.active and job.cancelled}.values():
        write(f"{job.stage}: job {job.id} was cancelled and has not ended yet; what is submitted now waits for its end")
    return [(job, task) for job, task in found if task.active and job.id not in doomed]


def ending_jobs(run_folder: Path, dry_run: bool) -> list[str]:
    """Ids of jobs that were cancelled and have not ended: they may still save, so what is submitted waits for them.

    Args:
        dry_run: do without where Slurm does not answer.

    Raises:
        ClusterError: Slurm does not answer.
    """
    cancelled = [(job.id, job.name) for job in read_jobs(run_folder) if job.cancelled]
    try:
        return list(dict.fromkeys(task.job for task in slurm.tasks(cancelled) if task.active))
    except ClusterError:
        if not dry_run:
            raise
        return []


def lost_jobs(run_folder: Path) -> list[Job]:
    """Jobs in the queue that no record names: Slurm took them, but its answer was lost or nobody lived to record it.

    They are known by their script, whose path belongs to one stage of one run; comments can be switched off or used for
    something else, and an sbatch that failed tells no id.

    Raises:
        ClusterError: squeue does not answer.
    """
    submission = read_submission(run_folder)
    if submission is None:
        return []
    job, script = submission
    recorded = {other.id for other in read_jobs(run_folder)}
    return [replace(job, id=found) for found in slurm.jobs_of_script(script, job.name) if found not in recorded]


def adopt_lost(run_folder: Path, write: Callable[[str], None]) -> list[Job]:
    """Record the jobs that `lost_jobs` finds, and return them."""
    found = lost_jobs(run_folder)
    for job in found:
        add_job(run_folder, job)
        write(f"{job.stage}: job {job.id} was submitted, although sbatch did not get to say so")
    return found


def _doomed(found: Sequence[tuple[Job, slurm.Task]]) -> set[str]:
    """Ids of jobs that were cancelled, or that depend on a failed or doomed job; Slurm ends them after a while."""
    active = {job.id for job, task in found if task.active}
    lost = {job.id for job, task in found if job.id not in active and task.state != "COMPLETED"}
    waiting = {job.id: job for job, task in found if task.state == "PENDING"}
    doomed = {
        job.id for job, task in found if task.active and (job.cancelled or task.reason == "DependencyNeverSatisfied")
    }
    while more := {name for name, job in waiting.items() if (lost | doomed) & set(job.after)} - doomed:
        doomed |= more
    return doomed


def check_stage(
    job: Job,
    state: str,
    recipe: Recipe,
    recipe_path: Path,
    run_folder: Path,
    planned: dict[str, str],
    write: Callable[[str], None],
) -> None:
    """Refuse a stage whose queued job does not match the current recipe.

    Args:
        planned: identities of unfinished stages by name, filled in as needed; shared by all stages of a run.
        write: receives a warning if only values differ that do not change the result.

    Raises:
        ClusterError: a value differs from what the job will read.
        StageError: the folder that the job resumes from was made from other settings or inputs.
    """
    check_asked(job, job.stage, f"stage {job.stage!r}: job {job.id} ({state})", recipe, recipe_path, run_folder, write)
    folder = run_folder / job.stage
    if not is_begun(folder) and not is_finished(folder):  # nothing to protect yet, and hashing inputs takes time
        return
    try:
        check_unchanged(describe(recipe, recipe.stage(job.stage), run_folder, planned), folder, recipe)
    except StageError as error:
        first = f"job {job.id} ({state}) of this stage is in the queue: end it first, {_cancel(run_folder)}; then"
        raise StageError(error.what, error.why, f"{first} {error.do}") from None


def check_asked(
    job: Job, key: str, who: str, recipe: Recipe, recipe_path: Path, run_folder: Path, write: Callable[[str], None]
) -> None:
    """Refuse a stage, or a cell of a grid, whose queued job reads other values than the current recipe's.

    Args:
        key: name of the stage or the cell.
        who: that name and the job, for the message.
        write: receives a warning if only values differ that do not change the result.

    Raises:
        ClusterError: names what has changed.
    """
    if key not in job.overrides:  # a job of an earlier version, which did not record them
        return
    copy = run_folder / job.recipe
    try:
        before = load_recipe(copy, job.overrides[key])
    except MinimaError as error:
        write(f"warning: {who} is in the queue, but the recipe that it will read cannot be checked: {error.what}")
        return
    names = [job.stage] if key == job.stage else job.stages
    kept = {stage.name: stage for stage in before.stages if stage.name in names}
    deciding: list[str] = []
    free: list[str] = []
    for stage in [stage for stage in recipe.stages if stage.name in kept]:
        where = () if key == job.stage else ("stages", stage.name)
        for keys, (old, new) in _changes(kept[stage.name], copy, stage, recipe_path).items():
            text = f"{'.'.join([*where, *keys])} {_two_values(old, new)}"
            (free if _is_free(stage, keys) else deciding).append(text)
    for text in free if not deciding else ():
        write(f"warning: {who} keeps {text}: it reads the recipe as it was submitted")
    if deciding:
        raise ClusterError(
            f"{who} is in the queue with {'; '.join(deciding + free)}",
            "it reads the recipe as it was submitted, so the change would be ignored",
            f"undo the change; or end the run's jobs, {_cancel(run_folder)}, and submit again",
        )


def warn_asked(job: Job, who: str, asked: dict[str, Any], write: Callable[[str], None]) -> None:
    """Warn if settings that a queued job took from the cluster file and the flags have changed since.

    It is not an error, because only the recipe determines the result.

    Args:
        who: the name of its stage or cell and the job, for the message.
        asked: the current settings; see `asked_of`.
    """
    for keys, (old, new) in _differences((), job.asked, asked) if job.asked else ():
        write(f"warning: {who} keeps {'.'.join(keys)} {_two_values(old, new)}: it was submitted with that")


def _is_free(stage: AnyStage, keys: tuple[str, ...]) -> bool:
    return keys[0] in free_keys(stage) or (keys[0] == "teacher" and keys[-1] in PLACING)


def _changes(
    before: AnyStage, before_path: Path, now: AnyStage, now_path: Path
) -> dict[tuple[str, ...], tuple[Any, Any]]:
    """Keys whose values differ, with both values; a DeepSpeed JSON whose content has changed counts too."""
    found = dict(_differences((), before.model_dump(mode="json"), now.model_dump(mode="json")))
    if not found and own_jsons(before, before_path) != own_jsons(now, now_path):
        found["deepspeed",] = ("as it was", "as the JSON is now")
    return found


def _differences(keys: tuple[str, ...], old: Any, new: Any) -> Iterator[tuple[tuple[str, ...], tuple[Any, Any]]]:
    """The paths of the innermost keys whose values differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences((*keys, key), old.get(key), new.get(key))
    elif old != new:
        yield keys, (old, new)


def _cancel(run_folder: Path) -> str:
    return f"`minima cancel {quoted([str(run_folder)])}`"


def _two_values(old: Any, new: Any) -> str:
    """Two values as text, shortened if they are long, unless they would then look the same."""
    whole = [json.dumps(value, ensure_ascii=False) for value in (old, new)]
    short = [text if len(text) <= _SHOWN_LETTERS else text[: _SHOWN_LETTERS - 3] + "..." for text in whole]
    return ", not ".join(whole if short[0] == short[1] else short)

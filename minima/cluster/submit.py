"""`minima submit`: a run as jobs of Slurm, each after the one before it; submitted again, what is missing. No torch."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from minima.cluster import slurm
from minima.cluster.plan import check_run, make_place, stage_scripts, warn_unread
from minima.cluster.records import Job, add_job, read_jobs
from minima.cluster.render import Place, Script, quoted
from minima.cluster.runs import RESOLVED
from minima.cluster.saves import save_warnings
from minima.cluster.snapshot import snapshot
from minima.errors import ClusterError
from minima.recipe.loading import load_recipe, resolved_yaml
from minima.stages.lock import run_lock
from minima.stages.manifest import is_finished
from minima.stages.run_folder import check_run_folder
from minima.stages.running import select


def submit(
    recipe_path: Path,
    overrides: Sequence[str],
    cluster_path: Path,
    names: Sequence[str] | None,
    grid: Path | None,
    dry_run: bool,
    write: Callable[[str], None],
) -> int:
    """Submit a job for each stage that is not finished and has none; each waits for the one before it.

    The jobs read a copy of the recipe as it is now, with these overrides.

    Args:
        recipe_path: the recipe's file.
        overrides: `key.path=value`, for every job.
        cluster_path: the cluster file.
        names: only these stages; all for None.
        grid: a file that lists cells: the whole recipe runs once for each.
        dry_run: print scripts and commands, and submit and write nothing; needs no Slurm.
        write: takes text for the person who waits.

    Returns:
        0.

    Raises:
        MinimaError: the run is sure to fail, or Slurm refuses; what was submitted before stays, and submitting again
            goes on from there.
    """
    if grid is not None:
        from minima.cluster.grid import submit_grid

        return submit_grid(recipe_path, overrides, cluster_path, names, grid, dry_run, write)
    recipe = load_recipe(recipe_path, overrides)
    stages = select(recipe, names)
    place = make_place(recipe, cluster_path)
    folder = place.run_folder
    check_run_folder(folder, recipe.name, [stage.name for stage in recipe.stages])
    warn_unread(place.cluster, recipe, write)
    with ExitStack() as stack:
        if not dry_run:
            stack.enter_context(run_lock(place.scripts))  # two submissions at once would submit everything twice
        queued = queued_jobs(folder, dry_run, write)
        waiting = {job.stage for job in queued}
        left = [stage for stage in stages if not is_finished(folder / stage.name)]
        missing = [stage for stage in left if stage.name not in waiting]
        for stage in stages:
            if stage not in left:
                write(f"{stage.name}: finished")
            elif stage not in missing:
                ids = ", ".join(job.id for job in queued if job.stage == stage.name)
                write(f"{stage.name}: job {ids} is in the queue")
        check_run(recipe, recipe_path, [s for s in recipe.stages if s in stages or s.name in waiting], place)
        copy = snapshot(recipe, recipe_path, folder / "cluster" / "recipes", write=not dry_run)
        scripts = [script for stage in missing for script in stage_scripts(recipe, copy, overrides, stage, place)]
        for warning in save_warnings(missing, place, dry_run):
            write(f"warning: {warning}")
        if scripts and not dry_run:
            write_file(
                place.scripts / RESOLVED, resolved_yaml(recipe)
            )  # `minima status` knows the stages before they begin
        submit_chain(scripts, [job.id for job in queued], place, dry_run, write)
    if not scripts:
        write("nothing to submit")
    elif not dry_run:
        write(f"`minima status {quoted([str(folder)])}` shows how they get on")
    return 0


def queued_jobs(run_folder: Path, dry_run: bool, write: Callable[[str], None]) -> list[Job]:
    """The run's jobs that wait or run."""
    jobs = read_jobs(run_folder)
    if not jobs or (dry_run and not slurm.is_here()):
        return []
    try:
        found = slurm.tasks([(job.id, job.name) for job in jobs])
    except ClusterError as error:
        if not dry_run:
            raise
        write(f"warning: earlier jobs are not looked at: {error.what}")
        return []
    active = {task.job for task in found if task.active}
    return [job for job in jobs if job.id in active]


def submit_chain(
    scripts: Sequence[Script], after: Sequence[str], place: Place, dry_run: bool, write: Callable[[str], None]
) -> None:
    """Submit jobs, each after the one before it.

    Args:
        scripts: in order.
        after: ids of jobs that the first waits for.
        place: where scripts and records lie.
        dry_run: print scripts and commands instead.
        write: takes text for a person.
    """
    before = list(after)
    for script in scripts:
        command = script.command(before)
        if dry_run:
            write(f"==> {script.path}\n{script.text}\n==> {quoted(command)}\n")
            before = [f"ID_OF_{script.name}"]
            continue
        job = _submit(script, command, before, place)
        asked = script.resources
        shape = (
            f"{asked.ranks} rank{'s' * (asked.ranks > 1)} on {asked.nodes or 1} node{'s' * ((asked.nodes or 1) > 1)}"
        )
        waits = f", after {', '.join(before)}" if before else ""
        write(f"{script.stage}: job {job.id}{'' if script.role == 'stage' else f' ({script.role})'}, {shape}{waits}")
        before = [job.id]


def _submit(script: Script, command: Sequence[str], after: Sequence[str], place: Place) -> Job:
    place.logs.mkdir(parents=True, exist_ok=True)  # Slurm makes no folder for a log; the job would fail unheard
    write_file(script.path, script.text)
    printed = slurm.call(command, f"handed the job of stage {script.stage}")
    identifier = printed.strip().splitlines()[-1].split(";")[0] if printed.strip() else ""
    if not identifier.isdigit():
        raise ClusterError(
            f"sbatch prints {printed!r}, handed the job of stage {script.stage}",
            "without the job's id nothing can wait for it",
            "look for it with squeue and cancel it; a wrapper of sbatch may not pass --parsable on",
        )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    cells = {str(index): name for index, name in enumerate(script.cells)}
    job = Job(identifier, script.name, script.stage, script.role, script.resources.ranks, list(after), now, cells)
    add_job(place.run_folder, job)
    return job


def write_file(path: Path, text: str) -> None:
    """Write a file so that it is there whole or as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)

"""`minima submit`: submits a run as a chain of Slurm jobs; submitting again adds only missing ones. No torch."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from minima.cluster.chain import submit_chain
from minima.cluster.grid import submit_grid
from minima.cluster.jobs import Job
from minima.cluster.plan import check_jobs, make_place, stage_scripts, warn
from minima.cluster.queued import check_stage, queued_tasks, warn_asked
from minima.cluster.recipe_copy import copy_recipe
from minima.cluster.render import Place, asked_of, quoted
from minima.cluster.runs import RESOLVED
from minima.cluster.saves import save_warnings
from minima.cluster.secret import check_values
from minima.cluster.slurm import Task
from minima.disk import write_whole
from minima.recipe.loading import load_recipe, resolved_yaml
from minima.recipe.schema import Recipe
from minima.stages.driver.pipeline import ALLOW_CODE_EXECUTION
from minima.stages.lock import run_lock
from minima.stages.manifest import is_finished
from minima.stages.run_folder import check_run_folder


def submit(
    recipe_path: Path,
    overrides: Sequence[str],
    cluster_path: Path,
    names: Sequence[str] | None,
    grid: Path | None,
    dry_run: bool,
    write: Callable[[str], None],
    allow_code_execution: bool = False,
) -> int:
    """Submit a job for each unfinished stage that has none yet; each waits for the one before it.

    The jobs read a copy of the recipe in its current state, with these overrides.

    Args:
        overrides: `key.path=value`, for every job.
        names: only these stages; None for all.
        grid: a file that lists cells: the whole recipe runs once for each.
        dry_run: print scripts and commands, without submitting or writing anything; needs no Slurm.
        allow_code_execution: let benchmarks execute code that a model wrote; passed on to the stages.

    Raises:
        MinimaError: the run is certain to fail, or Slurm refuses; already submitted jobs stay, and submitting again
            adds the missing ones.
    """
    if grid is not None:
        return submit_grid(recipe_path, overrides, cluster_path, names, grid, dry_run, write, allow_code_execution)
    check_values("overrides", overrides)
    recipe = load_recipe(recipe_path, overrides)
    stages = recipe.select(names)
    place = make_place(recipe, cluster_path, (ALLOW_CODE_EXECUTION,) if allow_code_execution else ())
    folder = place.run_folder
    check_run_folder(folder, recipe)
    warn(place, recipe, write)
    with ExitStack() as stack:
        if not dry_run:
            stack.enter_context(run_lock(place.scripts))  # concurrent submissions would submit everything twice
        tasks = queued_tasks(folder, dry_run, write)
        queued = list({job.id: job for job, _ in tasks}.values())
        waiting = {job.stage for job in queued}
        left = [stage for stage in stages if not is_finished(folder / stage.name)]
        missing = [stage for stage in left if stage.name not in waiting]
        for stage in stages:
            if stage not in left:
                write(f"{stage.name}: finished")
            elif stage not in missing:
                ids = ", ".join(job.id for job in queued if job.stage == stage.name)
                write(f"{stage.name}: job {ids} is in the queue")
        _check_queued(tasks, recipe, recipe_path, place, write)
        asked = [stage for stage in recipe.stages if stage in stages or stage.name in waiting]
        for line in check_jobs(recipe, recipe_path, asked, place):
            write(f"warning: {line}")
        copy = copy_recipe(recipe, recipe_path, folder / "cluster" / "recipes", write=not dry_run)
        scripts = [script for stage in missing for script in stage_scripts(recipe, copy, overrides, stage, place)]
        for warning in save_warnings(missing, place, dry_run):
            write(f"warning: {warning}")
        if scripts and not dry_run:
            # lets `minima status` show the stages before they start
            write_whole(place.scripts / RESOLVED, resolved_yaml(recipe))
        submit_chain(scripts, queued, place, dry_run, write, [stage.name for stage in recipe.stages])
    if not scripts:
        write("nothing to submit")
    elif not dry_run:
        write(f"`minima status {quoted([str(folder)])}` shows their progress")
    return 0


def _check_queued(
    tasks: Sequence[tuple[Job, Task]], recipe: Recipe, recipe_path: Path, place: Place, write: Callable[[str], None]
) -> None:
    """Refuse or warn about queued jobs that do not match the current recipe and cluster file."""
    unfinished = {stage.name for stage in recipe.stages if not is_finished(place.run_folder / stage.name)}
    planned: dict[str, str] = {}
    for job, state in {job.stage: (job, task.state) for job, task in tasks}.values():
        if job.stage in unfinished:
            check_stage(job, state, recipe, recipe_path, place.run_folder, planned, write)
            asked = asked_of(place, place.cluster.resources(recipe.stage(job.stage)))
            warn_asked(job, f"stage {job.stage!r}: job {job.id} ({state})", asked, write)

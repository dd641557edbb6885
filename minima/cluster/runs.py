"""Opens a run by its folder or its recipe, and looks up its jobs in Slurm. No torch."""

import os
from collections.abc import Sequence
from pathlib import Path

from minima.cluster import slurm
from minima.cluster.jobs import FOLDER, Job, read_jobs
from minima.errors import ClusterError, RecipeError
from minima.recipe.loading import load_recipe
from minima.recipe.overrides import nearest
from minima.recipe.schema import Recipe
from minima.stages.shipped import find_recipe

RESOLVED = "recipe.yaml"  # in the run's folder once a stage has started, and in its `cluster/` once submitted


def open_run(run: str) -> tuple[Recipe, Path]:
    """A run's recipe and folder.

    Args:
        run: the folder, or a recipe's path or name.

    Raises:
        ClusterError: the folder is not a run's.
        MinimaError: there is no such recipe, or it is invalid.
    """
    folder = Path(run).expanduser()
    if not folder.is_dir():
        try:
            path = find_recipe(run)
        except RecipeError:
            beside = [str(other) for other in folder.parent.glob("*") if other.is_dir()]
            raise ClusterError(
                f"{run!r} is neither a run's folder nor a recipe on this machine{nearest(run, beside)}",
                "the recipe in a run's folder says which stages there are",
                "give the folder of a run, such as runs/NAME, or its recipe",
            ) from None
        recipe = load_recipe(path)
        return recipe, recipe.folder
    resolved = [path for path in (folder / RESOLVED, folder / FOLDER / RESOLVED) if path.is_file()]
    if not resolved:
        raise ClusterError(
            f"{folder} is not a run's folder: it has no {RESOLVED}",
            "the recipe says which stages there are",
            "give the folder of a run (its `output`), or its recipe",
        )
    return load_recipe(max(resolved, key=os.path.getmtime)), folder


def newest_jobs(folder: Path, lost: Sequence[Job] = ()) -> dict[str, list[Job]]:
    """Each stage's last submission: one job, or the array of its parts and the job that merges them.

    The key `cells` has all submissions of a grid's cells, oldest first.

    Args:
        lost: jobs that are not recorded there; see `queued.lost_jobs`.
    """
    found: dict[str, list[Job]] = {}
    for job in [*read_jobs(folder), *lost]:
        if job.role in ("merge", "cells") and found.get(job.stage):
            found[job.stage].append(job)
        else:
            found[job.stage] = [job]
    return found


def look_up(jobs: list[Job]) -> dict[str, list[slurm.Task]]:
    """Look up jobs in Slurm's queue, or else among its ended jobs; returns their tasks by job id.

    Raises:
        ClusterError: Slurm is installed but does not answer.
    """
    if not jobs or not slurm.is_here():
        return {}
    pairs = [(job.id, job.name) for job in jobs]
    found: dict[str, list[slurm.Task]] = {}
    for task in slurm.tasks(pairs, ended=True):
        found.setdefault(task.job, []).append(task)
    for task in slurm.accounted([pair for pair in pairs if pair[0] not in found]):
        found.setdefault(task.job, []).append(task)
    return found

"""Plans a run's jobs: checks, warnings, and the scripts of each stage. Submits nothing."""

import typing
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from minima.cluster.config import CELLS
from minima.cluster.loading import load_cluster
from minima.cluster.render import Place, Script, check_place, python, quoted, render
from minima.errors import ClusterError
from minima.planning.arithmetic import check_batch
from minima.recipe.overrides import nearest
from minima.recipe.references import uses_ranks
from minima.recipe.schema import AnyStage, AnyTraining, Recipe
from minima.stages.driver.checks import check_stages
from minima.stages.manifest import is_finished

_KINDS = [
    typing.get_args(kind.model_fields["kind"].annotation)[0] for kind in typing.get_args(typing.get_args(AnyStage)[0])
]
_NO_GPU = ("build_data", "expand_vocabulary", "publish")  # kinds of stages that use no GPU


def make_place(recipe: Recipe, cluster_path: Path, flags: tuple[str, ...] = ()) -> Place:
    """The place where a recipe's jobs will run.

    Raises:
        ClusterError: the cluster file is invalid, or its working directory is not the current one.
    """
    cluster, here = load_cluster(cluster_path), Path.cwd()
    if cluster.working_directory is not None:
        meant = Path(cluster.working_directory)
        if not meant.is_dir() or not meant.samefile(here):
            raise ClusterError(
                f"the cluster file's working_directory is {meant}, but the current directory is {here}",
                "relative paths in the recipe start from the current directory, so the jobs would read other files",
                f"submit from there: cd {meant}",
            )
        here = meant.absolute()
    place = Place(cluster, here, recipe.folder, flags)
    check_place(place)
    return place


def warn(place: Place, recipe: Recipe, write: Callable[[str], None]) -> None:
    """Warn about mistakes in a cluster file: unknown stages, a missing venv, a run folder outside the container."""
    cluster, folder = place.cluster, place.run_folder
    known = [*_KINDS, CELLS, *(stage.name for stage in recipe.stages)]
    for key in cluster.stages:
        if key not in known:
            close = nearest(key, known)
            write(f"warning: the cluster file's stages.{key} is neither a kind nor a stage of this recipe{close}")
    if cluster.container is None and cluster.venv is not None:
        activate = place.working_directory / cluster.venv / "bin" / "activate"
        if not activate.is_file():
            write(
                f"warning: {activate} does not exist; if the nodes share this file system, every job will fail at once"
            )
    mounts = cluster.container.mounts if cluster.container is not None else []
    seen = [str(place.working_directory), *(mount.split(":")[1] if ":" in mount else mount for mount in mounts)]
    outside = folder.is_absolute() and not any(folder.is_relative_to(path) for path in seen)
    if cluster.container is not None and outside:
        write(
            f"warning: the run's folder {folder} is neither below the working directory nor among the container's "
            "mounts: what the jobs write there will be lost with the container"
        )


def check_jobs(recipe: Recipe, recipe_path: Path, stages: Sequence[AnyStage], place: Place) -> list[str]:
    """Refuse, before anything is queued, whatever is certain to fail later.

    Args:
        stages: the stages that will run, or whose jobs are queued.

    Returns:
        What may fail later, one line each.

    Raises:
        MinimaError: see `check_stages`; or a batch cannot be divided among the ranks of its stage.
    """
    idle = []
    for stage in stages:
        resources = place.cluster.resources(stage)
        if is_finished(place.run_folder / stage.name):
            continue
        if isinstance(stage, AnyTraining):
            check_batch(stage.name, stage, resources.ranks)
        if stage.kind in _NO_GPU and resources.gpus_per_node:
            each = f" in each of its {resources.array} jobs" if resources.array else ""
            idle.append(
                f"stage {stage.name!r} requests {resources.gpus_per_node} GPUs{each} but uses none; if its partition "
                f"allows it, set `stages: {{{stage.kind}: {{gpus_per_node: 0}}}}` in the cluster file"
            )
    alone = recipe.model_copy(update={"ranks": 1})  # the ranks of this machine do not matter
    return [*idle, *check_stages(alone, recipe_path, stages, place.run_folder, 1, elsewhere=True)]


def stage_scripts(
    recipe: Recipe, recipe_file: Path, overrides: Sequence[str], stage: AnyStage, place: Place
) -> list[Script]:
    """The scripts of one stage's jobs: a single one, or an array and a job that merges its results.

    Args:
        recipe_file: the file that the jobs read.
    """
    resources = place.cluster.resources(stage)
    if resources.array is None:
        return [_script(recipe, recipe_file, overrides, stage, place, "stage")]
    return [_script(recipe, recipe_file, overrides, stage, place, role) for role in ("parts", "merge")]


def _script(
    recipe: Recipe, recipe_file: Path, overrides: Sequence[str], stage: AnyStage, place: Place, role: str
) -> Script:
    resources = place.cluster.resources(stage)
    suffix = "" if role == "stage" else f".{role}"
    command = [*python(place, resources), "-m", "minima", "stage", str(recipe_file), "--stages", stage.name]
    command += [*overrides, *place.flags]
    work = run_stage(place, stage, command)
    if role == "parts":
        work += f' --part "$SLURM_ARRAY_TASK_ID/{resources.array}"'
    lines = [work]
    if role != "parts" and stage.name == recipe.stages[-1].name:
        lines.append(summary(place, recipe, recipe_file, overrides))
    what = {"stage": "Stage", "parts": "A part of stage", "merge": "The merge of stage"}[role]
    ranks = f"{resources.ranks} ranks on {resources.nodes or 1} nodes" if uses_ranks(stage) else "one process"
    made = render(
        place,
        name=f"{recipe.name}.{stage.name}{suffix}",
        stage=stage.name,
        role=role,
        resources=resources,
        work=lines,
        note=f"{what} {stage.name} ({stage.kind}): {ranks}.",
    )
    return replace(made, recipe=recipe_file, overrides={stage.name: overrides})


def run_stage(place: Place, stage: AnyStage, command: Sequence[str], folder: Path | None = None) -> str:
    """The line of a script that runs a stage's command, on the job's ranks or in a single process.

    Args:
        folder: the run's folder, if it is not the place's but a cell's.
    """
    function = "run_stage" if uses_ranks(stage) else "run_alone"
    return f"{function} {quoted([str(folder or place.run_folder), stage.name, *command])}"


def summary(
    place: Place, recipe: Recipe, recipe_file: Path, overrides: Sequence[str], folder: Path | None = None
) -> str:
    """The line of a script that ends a run: prints its table, and writes summary.json once every stage is finished.

    It names the last stage, which is already finished when this line runs, so it runs no stage.

    Args:
        recipe_file: the file that the jobs read.
        folder: the run's folder, if it is not the place's but a cell's.
    """
    command = [*python(place, place.cluster.merged("export")), "-m", "minima", "run", str(recipe_file)]
    command += ["--stages", recipe.stages[-1].name, *overrides]
    return f"run_alone {quoted([str(folder or place.run_folder), 'summary', *command])}"

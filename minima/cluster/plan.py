"""Which jobs a run needs: one for each stage that is not finished and has none. Nothing is submitted here."""

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
from minima.stages.checks import check_stages
from minima.stages.manifest import is_finished

_KINDS = [
    typing.get_args(kind.model_fields["kind"].annotation)[0] for kind in typing.get_args(typing.get_args(AnyStage)[0])
]


def make_place(recipe: Recipe, cluster_path: Path, flags: tuple[str, ...] = ()) -> Place:
    """Where a recipe's jobs work.

    Raises:
        ClusterError: the cluster file is refused, or its working directory is not the current one.
    """
    cluster, here = load_cluster(cluster_path), Path.cwd()
    if cluster.working_directory is not None:
        meant = Path(cluster.working_directory)
        if not meant.is_dir() or not meant.samefile(here):
            raise ClusterError(
                f"the cluster file's working_directory is {meant}, and this is {here}",
                "the recipe's relative paths are looked up where a command runs, so the jobs would read other files",
                f"submit from there: cd {meant}",
            )
        here = meant.absolute()
    place = Place(cluster, here, recipe.folder, flags)
    check_place(place)
    return place


def warn(place: Place, recipe: Recipe, write: Callable[[str], None]) -> None:
    """Say what of a cluster file does not fit: unknown stages, a missing venv, a run folder outside the container."""
    cluster, folder = place.cluster, place.run_folder
    known = [*_KINDS, CELLS, *(stage.name for stage in recipe.stages)]
    for key in cluster.stages:
        if key not in known:
            write(f"warning: the cluster file's stages.{key} is neither a kind nor a stage here{nearest(key, known)}")
    if cluster.container is None and cluster.venv is not None:
        activate = place.working_directory / cluster.venv / "bin" / "activate"
        if not activate.is_file():
            write(f"warning: {activate} is not there; where the nodes see the same files, every job would end at once")
    mounts = cluster.container.mounts if cluster.container is not None else []
    seen = [str(place.working_directory), *(mount.split(":")[1] if ":" in mount else mount for mount in mounts)]
    outside = folder.is_absolute() and not any(folder.is_relative_to(path) for path in seen)
    if cluster.container is not None and outside:
        write(
            f"warning: the run's folder {folder} is neither below the working directory nor among the container's "
            "mounts: what the jobs write there is lost with the container"
        )


_NO_GPU = ("build_data", "expand_vocabulary", "publish")  # kinds of stages that compute on the host


def check_jobs(recipe: Recipe, recipe_path: Path, stages: Sequence[AnyStage], place: Place) -> list[str]:
    """Refuse, before anything waits in a queue, what is sure to fail later.

    Args:
        recipe: the whole run.
        recipe_path: its file.
        stages: that will run, or whose jobs are queued.
        place: with the resources of each.

    Returns:
        What may fail later, a line each.

    Raises:
        MinimaError: see `check_stages`; or a batch cannot be shared by the ranks of its stage.
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
                f"stage {stage.name!r} asks for {resources.gpus_per_node} GPUs{each} and uses none; where its "
                f"partition allows it, give the cluster file `stages: {{{stage.kind}: {{gpus_per_node: 0}}}}`"
            )
    alone = recipe.model_copy(update={"ranks": 1})  # the ranks of this machine do not matter
    return [*idle, *check_stages(alone, recipe_path, stages, place.run_folder, 1, elsewhere=True)]


def stage_scripts(
    recipe: Recipe, recipe_file: Path, overrides: Sequence[str], stage: AnyStage, place: Place
) -> list[Script]:
    """The jobs of one stage: one; or an array and the job that merges what it made.

    Args:
        recipe: the whole run.
        recipe_file: that the jobs read.
        overrides: for every job.
        stage: to run.
        place: where.
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
    what = {"stage": "Stage", "parts": "A part of stage", "merge": "The merging of stage"}[role]
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
    """The line of a script that runs a stage's command on the job's ranks, or once where one process does it.

    Args:
        place: where the job works.
        stage: to run.
        command: program and arguments.
        folder: of the run, where it is not the place's: a cell's.
    """
    function = "run_stage" if uses_ranks(stage) else "run_alone"
    return f"{function} {quoted([str(folder or place.run_folder), stage.name, *command])}"


def summary(
    place: Place, recipe: Recipe, recipe_file: Path, overrides: Sequence[str], folder: Path | None = None
) -> str:
    """The line that ends a run: its table, and summary.json once every stage is finished.

    It runs no stage where it follows the last one, which is the one that it names.

    Args:
        place: where the job works.
        recipe: the whole run.
        recipe_file: that the jobs read.
        overrides: of the recipe.
        folder: of the run, where it is not the place's: a cell's.
    """
    command = [*python(place, place.cluster.merged("export")), "-m", "minima", "run", str(recipe_file)]
    command += ["--stages", recipe.stages[-1].name, *overrides]
    return f"run_alone {quoted([str(folder or place.run_folder), 'summary', *command])}"

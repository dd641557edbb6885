"""The driver behind `minima run`: which stages are left, in which process groups, and what they came to. No torch."""

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from minima.errors import LauncherError, RecipeError, StageError
from minima.launcher import child_environment, default_ranks, read_launch
from minima.recipe.loading import load_recipe, resolved_yaml
from minima.recipe.references import references
from minima.recipe.schema import AnyStage, Recipe
from minima.report.run_table import run_table
from minima.stages.child import Log, run_child
from minima.stages.lock import run_lock
from minima.stages.manifest import check_unchanged, describe, is_finished
from minima.stages.run_folder import check_run_folder, claim_run_folder
from minima.stages.running import output_folder, select, uses_ranks
from minima.stages.shipped import find_deepspeed_json, find_launcher
from minima.stages.summary import stage_rows, write_summary

SHORT_KINDS = (
    "prune",
    "evaluate",
    "export",
)  # neighbours of these kinds share a process group: starting one costs 10 s


def run(recipe_path: Path, overrides: Sequence[str], names: Sequence[str] | None, write: Callable[[str], None]) -> int:
    """Run what is left of a recipe: each unfinished stage in a process group of its own, in order.

    Args:
        recipe_path: the recipe's file.
        overrides: `key.path=value`; handed on to the ranks.
        names: only these stages; all for None.
        write: takes text for the person who waits.

    Returns:
        0, or the exit code of the first process group that failed.

    Raises:
        MinimaError: the run cannot start; nothing was changed.
    """
    _refuse_inside_ranks()
    recipe = load_recipe(recipe_path, overrides)
    stages = select(recipe, names)
    folder = output_folder(recipe)
    ranks = recipe.ranks or (1 if recipe.launcher == "local" else default_ranks())
    check_run_folder(folder, recipe.name, [stage.name for stage in recipe.stages])
    check_stages(recipe, recipe_path, stages, folder, ranks)
    with run_lock(folder) as lock:
        claim_run_folder(folder, recipe.name, [stage.name for stage in recipe.stages], resolved_yaml(recipe))
        left = [stage for stage in stages if not is_finished(folder / stage.name)]
        done = [stage.name for stage in stages if stage not in left]
        if done:
            write(f"finished before: {', '.join(done)}")
        for group in group_stages(left):
            code = _run_group(recipe, recipe_path, overrides, group, ranks, lock, write)
            if code:
                return code
        summary = write_summary(recipe, folder)
    write(run_table(stage_rows(recipe, folder), summary))
    if not left:
        write(f"all done: every stage of {recipe.name} is finished in {folder}")
    elif summary is not None:
        write(f"all done: {folder / 'summary.json'}")
    return 0


def check_stages(recipe: Recipe, recipe_path: Path, stages: Sequence[AnyStage], folder: Path, ranks: int) -> None:
    """Refuse, before anything starts, what is sure to fail later.

    Raises:
        StageError: an input stage is neither finished nor among `stages`, or a stage or its input has changed.
        RecipeError: a DeepSpeed JSON or launcher is missing, or a batch cannot be shared by the ranks.
    """
    chosen = {stage.name for stage in stages}
    find_launcher(recipe.launcher)
    if recipe.launcher == "local" and ranks != 1:
        raise RecipeError(
            f"{ranks} ranks with the launcher 'local'",
            "it runs one plain process, so the other ranks would be silently dropped",
            "set ranks=1, or take the deepspeed or torchrun launcher",
        )
    for stage in stages:
        inputs = [reference for reference in references(recipe, stage) if reference.stage is not None]
        for reference in inputs:
            source = folder / str(reference.stage)
            if reference.stage not in chosen and not is_finished(source) and reference.step is None:
                raise StageError(
                    f"stage {stage.name!r} reads {reference.stage!r}, which is not finished in {folder}",
                    "it would start without its input",
                    f"add it: --stages {reference.stage},{stage.name}",
                )
        if all(is_finished(folder / str(reference.stage)) for reference in inputs):
            check_unchanged(describe(recipe, stage, folder), folder / stage.name)
        if is_finished(folder / stage.name):
            continue
        for key in ("deepspeed", "teacher_deepspeed"):
            if name := getattr(stage, key, None):
                find_deepspeed_json(name, recipe_path)
        check_batch(stage, ranks)


def check_batch(stage: AnyStage, ranks: int) -> None:
    """Refuse a batch that the ranks cannot share evenly.

    Raises:
        RecipeError: names the rank counts that do.
    """
    batch = getattr(stage, "batch_sequences", None)
    micro = getattr(stage, "micro_batch_sequences", 1)
    if batch is None or batch % (micro * ranks) == 0:
        return
    counts = [count for count in range(1, batch // micro + 1) if batch % (micro * count) == 0]
    micros = [size for size in range(1, batch + 1) if batch % (size * ranks) == 0]
    raise RecipeError(
        f"stages.{stage.name}: batch_sequences {batch} does not divide by {ranks} ranks "
        f"of micro_batch_sequences {micro}",
        "every rank runs the same number of whole micro-batches in a step",
        f"take {_some(counts)} ranks"
        + (f", or micro_batch_sequences {_some(micros)}" if micros else "")
        + f", or a batch that is a multiple of {micro * ranks}",
    )


def group_stages(stages: Sequence[AnyStage]) -> list[list[AnyStage]]:
    """Stages in order, neighbouring short ones together."""
    groups: list[list[AnyStage]] = []
    for stage in stages:
        short = stage.kind in SHORT_KINDS
        if short and groups and groups[-1][-1].kind in SHORT_KINDS:
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return groups


def _run_group(recipe, recipe_path, overrides, group, ranks, lock, write) -> int:
    folder = output_folder(recipe)
    names = ",".join(stage.name for stage in group)
    arguments = [str(recipe_path), "--stages", names, *overrides]
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    if uses_ranks(group[0]):
        environment = child_environment(ranks, terminal_columns=columns)
        command = ["bash", str(find_launcher(recipe.launcher)), *arguments]
    else:
        environment = child_environment(1, terminal_columns=columns)
        command = [sys.executable, "-m", "minima", "stage", *arguments]
    with Log(folder / "logs", group[0].name) as log:
        code = run_child(command, environment, log, lock)
    left = [stage for stage in group if not is_finished(folder / stage.name)]
    if code == 0 and left:
        code = 1
    if code:
        name = left[0].name if left else group[-1].name
        write(f"stage {name} failed with exit code {code}; its log is {folder / 'logs' / (name + '.log')}")
    return code


def _refuse_inside_ranks() -> None:
    launch = read_launch()
    if launch.world_size > 1:
        raise LauncherError(
            f"minima run inside rank {launch.rank} of {launch.world_size}",
            "it starts the ranks itself, so every rank would start a whole run",
            "call `minima run` once, without a launcher; or `minima stage` under this launcher",
        )


def _some(counts: Sequence[int]) -> str:
    return ", ".join(map(str, counts[:12])) + (", ..." if len(counts) > 12 else "")

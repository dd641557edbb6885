"""What the driver refuses before anything starts."""

from collections.abc import Sequence
from pathlib import Path

from minima.errors import RecipeError, StageError
from minima.recipe.references import references
from minima.recipe.schema import AnyStage, Recipe
from minima.stages.manifest import check_unchanged, describe, is_finished
from minima.stages.preview import walk
from minima.stages.shipped import find_deepspeed_json, find_launcher


def check_stages(recipe: Recipe, recipe_path: Path, stages: Sequence[AnyStage], folder: Path, ranks: int) -> None:
    """Refuse, before anything starts, what is sure to fail later.

    Raises:
        StageError: an input stage is neither finished nor among `stages`, or a stage or its input has changed.
        RecipeError: a DeepSpeed JSON or launcher is missing, or a batch cannot be shared by the ranks.
        MinimaError: a shape, a length or a vocabulary that the dry run already knows to be impossible.
    """
    chosen = {stage.name for stage in stages}
    walk(recipe, recipe_path)
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

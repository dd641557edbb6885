"""What the driver refuses before anything starts."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from minima.errors import RecipeError, StageError
from minima.launcher import num_accelerators
from minima.models.layout import complete_steps
from minima.recipe.references import Reference, deepspeed_jsons, references, uses_ranks
from minima.recipe.schema import AnyStage, Benchmark, Distil, Publish, Recipe
from minima.stages.context import missing_checkpoint_advice
from minima.stages.dry_run import walk
from minima.stages.hub import check_there
from minima.stages.identity import check_run
from minima.stages.manifest import is_finished
from minima.stages.shipped import check_deepspeed_json, find_launcher

_TOO_LATE = "the run would end there, after everything before it"
_ONE_MACHINE = ("local", "deepspeed", "torchrun")  # launchers that start every rank on this machine


def check_stages(
    recipe: Recipe,
    recipe_path: Path,
    stages: Sequence[AnyStage],
    folder: Path,
    ranks: int,
    *,
    to_come: Sequence[Path] = (),
    elsewhere: bool = False,
) -> list[str]:
    """Refuse, before anything starts, what is sure to fail later.

    Args:
        recipe: the whole run.
        recipe_path: its file.
        stages: that are to run.
        folder: of the run.
        ranks: that each stage will have.
        to_come: folders of other runs that will have been made by then.
        elsewhere: it runs on other machines, or later, so a folder that is not here is a warning and no mistake.

    Returns:
        What may fail later, a line each: inputs that are not on this machine.

    Raises:
        StageError: an input stage is neither finished nor among `stages`, or an input folder is not there; or a
            finished stage is not, or will not be, what the recipe and its inputs say.
        DeepSpeedConfigError: a DeepSpeed JSON sets what the recipe owns, or cannot be used.
        RecipeError: a DeepSpeed JSON, a launcher, a GPU or wandb is missing, or a batch cannot be shared by the ranks.
        MinimaError: a shape, a length or a vocabulary that the dry run already knows to be impossible.
    """
    previews = walk(recipe, recipe_path)
    find_launcher(recipe.launcher, recipe_path)
    left = [stage for stage in stages if not is_finished(folder / stage.name)]
    _check_ranks(recipe, ranks, any(uses_ranks(stage) for stage in left))
    _check_inputs(recipe, stages, folder)
    missing = _missing_folders(recipe, left, [folder, *to_come])
    if missing and not elsewhere:
        raise StageError(
            missing[0],
            _TOO_LATE,
            "correct it, or bring the folder to this machine",
        )
    check_run(recipe, stages, folder)
    if not elsewhere:
        _check_models(recipe, left, folder, [folder, *to_come])
    for stage in left:
        for name in deepspeed_jsons(stage):
            check_deepspeed_json(stage, name, recipe_path)
        _check_installed(stage)
    names = {stage.name for stage in left}
    return [f"stages.{found.name}: {text}" for found in previews if found.name in names for text in found.missing]


def _check_installed(stage: AnyStage) -> None:
    """Refuse a stage that needs a program or a token which is not here."""
    if isinstance(stage, Benchmark) and (stage.suite or stage.tasks) and find_spec("lm_eval") is None:
        raise RecipeError(
            f"stages.{stage.name}: lm-eval is not installed",
            _TOO_LATE,
            "pip install lm-eval accelerate, or run the other stages with --stages",
        )
    if isinstance(stage, Publish) and _has_no_token():
        raise RecipeError(
            f"stages.{stage.name}: there is no token for the Hub",
            _TOO_LATE,
            "log in with `hf auth login` or set HF_TOKEN, or run the other stages with --stages",
        )
    project = getattr(stage, "wandb_project", None)
    if project is not None and find_spec("wandb") is None:
        raise RecipeError(
            f"stages.{stage.name}: wandb_project is {project!r}, but wandb is not installed",
            "the run would not be logged where you look for it",
            "pip install wandb, or remove the key",
        )


def _has_no_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is None


def _check_ranks(recipe: Recipe, ranks: int, needed: bool) -> None:
    if recipe.launcher == "local" and ranks != 1:
        raise RecipeError(
            f"{ranks} ranks with the launcher 'local'",
            "it runs one plain process, so the other ranks would be silently dropped",
            "set ranks=1, or take the deepspeed or torchrun launcher",
        )
    accelerators = num_accelerators()
    if needed and recipe.launcher in _ONE_MACHINE and accelerators and ranks > accelerators:
        raise RecipeError(
            f"{ranks} ranks and {accelerators} GPU{'s' if accelerators > 1 else ''} on this machine",
            "every rank takes a GPU of its own, so the others would fail as they start",
            f"give --ranks {accelerators}, set DS_ACCELERATOR=cpu to run on the processor, or make more GPUs visible",
        )


def _check_inputs(recipe: Recipe, stages: Sequence[AnyStage], folder: Path) -> None:
    chosen = {stage.name for stage in stages}
    for stage in stages:
        for reference in references(recipe, stage):
            if reference.stage is None:
                continue
            if reference.step is not None and not is_finished(folder / stage.name):
                read = recipe.stage(reference.stage)
                _check_checkpoint(recipe, stage.name, reference, read, folder, read.name in chosen)
            if reference.stage in chosen or reference.step is not None:
                continue
            if not is_finished(folder / reference.stage):
                raise StageError(
                    f"stage {stage.name!r} reads {reference.stage!r}, which is not finished in {folder}",
                    "it would start without its input",
                    f"add it: --stages {','.join(_unfinished(recipe, stage, folder))}",
                )


def _unfinished(recipe: Recipe, stage: AnyStage, folder: Path) -> list[str]:
    """A stage and the unfinished ones that it reads, directly or through others, in the recipe's order."""
    needed = {stage.name}
    for other in reversed(recipe.stages):  # a stage reads earlier ones
        if other.name in needed:
            read = {reference.stage for reference in references(recipe, other) if reference.stage is not None}
            needed |= {name for name in read if not is_finished(folder / name)}
    return [other.name for other in recipe.stages if other.name in needed]


def _check_checkpoint(
    recipe: Recipe, reader: str, reference: Reference, read: AnyStage, run_folder: Path, chosen: bool
) -> None:
    """Refuse a checkpoint that is not there, where no training that is about to run will leave it."""
    assert reference.step is not None
    folder = run_folder / read.name
    there, finished = complete_steps(folder / "checkpoints"), is_finished(folder)
    if reference.step in there or (chosen and not finished and reference.step > max(there, default=0)):
        return
    raise StageError(
        f"stage {reader!r} reads {reference.text!r}, but {folder} has no checkpoint after step {reference.step:,}",
        _TOO_LATE,
        missing_checkpoint_advice(read, folder, there)
        if there or finished
        else f"add it: --stages {','.join([*_unfinished(recipe, read, folder), reader])}",
    )


def _check_models(recipe: Recipe, left: Sequence[AnyStage], folder: Path, to_come: Sequence[Path]) -> None:
    """Refuse models that are no folder and that the Hub does not have, each asked for once."""
    asked = set()
    for stage in left:
        unread = "teacher" if isinstance(stage, Distil) and stage.frozen_model is None else None
        for reference in references(recipe, stage):
            key = (reference.text, reference.revision)
            of_models = reference.what in ("model", "exported") and reference.field != unread
            if not of_models or reference.stage is not None or key in asked:
                continue
            path = Path(reference.text).expanduser()
            if not path.exists() and not any(path.absolute().is_relative_to(other.absolute()) for other in to_come):
                asked.add(key)
                check_there(*key, folder, f"stages.{stage.name}.{reference.field}")


def _missing_folders(recipe: Recipe, left: Sequence[AnyStage], to_come: Sequence[Path]) -> list[str]:
    """What can only be a folder, and is not there, a line each; what may be a Hub id is for the Hub to say."""
    found = []
    for stage in left:
        for reference in references(recipe, stage):
            of_minima = reference.what in ("data", "scores") or isinstance(stage, Publish)
            is_path = reference.stage is None and (of_minima or reference.text.startswith((".", "/", "~")))
            path = Path(reference.text).expanduser().absolute()
            if is_path and not path.exists() and not any(path.is_relative_to(other.absolute()) for other in to_come):
                found.append(
                    f"stages.{stage.name}.{reference.field}: {reference.text!r} is "
                    f"{'neither a stage of this recipe nor ' if of_minima else 'not '}a folder here"
                )
    return found

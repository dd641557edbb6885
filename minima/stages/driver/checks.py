"""The driver's checks before anything starts: problems that would otherwise fail hours later."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from minima.errors import RecipeError, StageError
from minima.launcher import has_host_file, num_accelerators
from minima.models.layout import complete_steps
from minima.planning.dry_run import StagePreview
from minima.recipe.references import Reference, deepspeed_jsons, references, uses_ranks
from minima.recipe.schema import AnyStage, Benchmark, Distil, Publish, Recipe
from minima.stages.context import missing_checkpoint_advice
from minima.stages.hub import check_there
from minima.stages.identity import check_run
from minima.stages.manifest import is_finished
from minima.stages.preview.dry_run import walk
from minima.stages.preview.known_fit import TOO_LATE
from minima.stages.shipped import check_deepspeed_json, find_launcher

_ONE_MACHINE = ("local", "deepspeed", "torchrun")  # launchers that start every rank on this machine
BY_HOST_FILE = ("deepspeed", "mpirun")  # launchers that start ranks on the machines of MINIMA_HOSTFILE, if it is set


def check_stages(
    recipe: Recipe,
    recipe_path: Path,
    stages: Sequence[AnyStage],
    folder: Path,
    ranks: int,
    *,
    to_come: Sequence[Path] = (),
    elsewhere: bool = False,
    ranks_elsewhere: bool = False,
) -> list[str]:
    """Refuse, before anything starts, whatever is certain to fail later.

    Args:
        to_come: folders of other runs that will exist by then.
        elsewhere: the run is on other machines, or later, so a folder missing here is a warning and not an error.
        ranks_elsewhere: this machine has the folders, but the GPUs and packages of the ranks are another one's.

    Returns:
        What may fail later, one line each: inputs that are not on this machine.

    Raises:
        StageError: an input stage is neither finished nor among `stages`, or an input folder is missing; or a finished
            stage does not, or will not, match the recipe and its inputs.
        DeepSpeedConfigError: a DeepSpeed JSON sets what the recipe owns, or cannot be used.
        RecipeError: a DeepSpeed JSON, a launcher, a GPU or a package is missing, a teacher cannot be placed, or a
            batch cannot be divided among the ranks.
        MinimaError: the dry run shows a shape, a length or a vocabulary to be impossible.
    """
    previews = walk(recipe, recipe_path)
    find_launcher(recipe.launcher, recipe_path)
    left = [stage for stage in stages if not is_finished(folder / stage.name)]
    _check_ranks(recipe, ranks, any(uses_ranks(stage) for stage in left))
    _check_inputs(recipe, stages, folder)
    missing = _missing_folders(recipe, left, [folder, *to_come])
    if missing and not elsewhere:
        raise StageError(missing[0], TOO_LATE, "correct it, or copy the folder to this machine")
    check_run(recipe, stages, folder)
    by_file = recipe.launcher in BY_HOST_FILE and recipe.ranks is None and has_host_file()
    here = recipe.launcher in _ONE_MACHINE and not (elsewhere or ranks_elsewhere or by_file)
    if here:
        _check_placed([found for found in previews if found.name in {stage.name for stage in left}], ranks)
    if not elsewhere:
        _check_models(recipe, left, folder, [folder, *to_come])
    for stage in left:
        for name in deepspeed_jsons(stage):
            check_deepspeed_json(stage, name, recipe_path)
        _check_installed(stage)
        if here:
            _check_liger(stage)
    names = {stage.name for stage in left}
    return [f"stages.{found.name}: {text}" for found in previews if found.name in names for text in found.missing]


def _check_installed(stage: AnyStage) -> None:
    """Refuse a stage that needs a program or a token that is missing on this machine."""
    if isinstance(stage, Benchmark) and (stage.suite or stage.tasks) and find_spec("lm_eval") is None:
        raise RecipeError(
            f"stages.{stage.name}: lm-eval is not installed",
            TOO_LATE,
            "pip install lm-eval accelerate, or run the other stages with --stages",
        )
    if isinstance(stage, Publish) and _has_no_token():
        raise RecipeError(
            f"stages.{stage.name}: there is no token for the Hub",
            TOO_LATE,
            "log in with `hf auth login` or set HF_TOKEN, or run the other stages with --stages",
        )
    project = getattr(stage, "wandb_project", None)
    if project is not None and find_spec("wandb") is None:
        raise RecipeError(
            f"stages.{stage.name}: wandb_project is {project!r}, but wandb is not installed",
            "the run would not be logged where you look for it",
            "pip install wandb, or remove the key",
        )


def _check_placed(previews: Sequence[StagePreview], ranks: int) -> None:
    for found in previews:
        if found.unplaced:
            raise RecipeError(
                f"stages.{found.name}.teacher: placement tensor_parallel is impossible on {ranks} "
                f"rank{'s' if ranks > 1 else ''} of a machine: {found.unplaced}",
                TOO_LATE,
                "use another number of ranks or another tensor_parallel_ranks, or placement zero3_node, or replica for "
                "a single rank",
            )


def _check_liger(stage: AnyStage) -> None:
    if getattr(stage, "kernels", "stock") != "liger":
        return
    if find_spec("liger_kernel") is None:
        raise RecipeError(
            f"stages.{stage.name}: kernels: liger, but liger-kernel is not installed",
            TOO_LATE,
            "pip install liger-kernel, or set kernels: stock",
        )
    if not num_accelerators():
        raise RecipeError(
            f"stages.{stage.name}: kernels: liger, but there is no GPU that this run may use",
            TOO_LATE,
            "set kernels: stock, or run this stage on a machine with a GPU; DS_ACCELERATOR=cpu and an empty "
            "CUDA_VISIBLE_DEVICES hide one",
        )


def _has_no_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is None


def _check_ranks(recipe: Recipe, ranks: int, needed: bool) -> None:
    if recipe.launcher == "local" and ranks != 1:
        raise RecipeError(
            f"{ranks} ranks with the launcher 'local'",
            "it runs one plain process, so the other ranks would be silently dropped",
            "set ranks=1, or use the deepspeed or torchrun launcher",
        )
    accelerators = num_accelerators()
    if needed and recipe.launcher in _ONE_MACHINE and accelerators and ranks > accelerators:
        raise RecipeError(
            f"{ranks} ranks, but {accelerators} GPU{'s' if accelerators > 1 else ''} on this machine",
            "every rank needs its own GPU, so the others would fail at start",
            f"give --ranks {accelerators}, set DS_ACCELERATOR=cpu to run on the CPU, or make more GPUs visible",
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
    """Refuse a checkpoint that neither exists nor will be saved by a training stage that is about to run."""
    assert reference.step is not None
    folder = run_folder / read.name
    there, finished = complete_steps(folder / "checkpoints"), is_finished(folder)
    if reference.step in there or (chosen and not finished and reference.step > max(there, default=0)):
        return
    raise StageError(
        f"stage {reader!r} reads {reference.text!r}, but {folder} has no checkpoint after step {reference.step:,}",
        TOO_LATE,
        missing_checkpoint_advice(read, folder, there)
        if there or finished
        else f"add it: --stages {','.join([*_unfinished(recipe, read, folder), reader])}",
    )


def _check_models(recipe: Recipe, left: Sequence[AnyStage], folder: Path, to_come: Sequence[Path]) -> None:
    """Refuse models that are neither a folder nor on the Hub; asks the Hub once for each."""
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
    """One line for each missing input that can only be a folder; names that may be Hub ids are left to the Hub."""
    found = []
    for stage in left:
        for reference in references(recipe, stage):
            of_minima = reference.what in ("data", "scores") or isinstance(stage, Publish)
            is_path = reference.stage is None and (of_minima or reference.text.startswith((".", "/", "~")))
            path = Path(reference.text).expanduser().absolute()
            if is_path and not path.exists() and not any(path.is_relative_to(other.absolute()) for other in to_come):
                found.append(
                    f"stages.{stage.name}.{reference.field}: {reference.text!r} is "
                    f"{'neither a stage of this recipe nor ' if of_minima else 'not '}a folder on this machine"
                )
    return found

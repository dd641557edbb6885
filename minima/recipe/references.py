"""Which earlier stages a stage reads: the only file that tells names of stages from paths and Hub ids."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from minima.errors import RecipeError
from minima.recipe.data import Source
from minima.recipe.distillation import PLACING
from minima.recipe.overrides import nearest
from minima.recipe.schema import AnyStage, AnyTraining, BuildData, Distil, Evaluate, ModelInput, Prune, Recipe
from minima.recipe.vocabulary import DonorTraining, ExpandVocabulary

STEPPED = ("adapt", "distil", "instruct", "align")  # kinds that leave checkpoints, so that `name@step` means something
WEIGHTS = (*STEPPED, "expand_vocabulary", "prune", "export")  # kinds whose folder holds a model
ALWAYS_SUMMED = ("tokens", "seconds", "export")  # always in summary.json; the last only if a stage exports
SINGLE_PROCESS = ("build_data", "expand_vocabulary", "benchmark", "publish")  # kinds that run in one process
EXPORTED = ("benchmark", "publish")  # kinds that read only models in Hugging Face's layout
LEARNABLE = ("text", "conversations")  # data formats with a loss for each token
# The formats of data that each kind of stage reads.
FORMATS_READ = {
    **dict.fromkeys(("adapt", "distil", "prune", "evaluate"), LEARNABLE),
    "instruct": ("conversations",),
    "align": ("preferences",),
}


def uses_ranks(stage: AnyStage) -> bool:
    """Whether a stage runs on all ranks; the others run in one process."""
    return stage.kind not in SINGLE_PROCESS


@dataclass(frozen=True)
class Reference:
    """One input of a stage, as the recipe writes it."""

    field: str  # the key of the stage that holds it: `model`, `teacher`, `data`, `models.0`
    text: str  # as written
    stage: str | None  # the earlier stage that it names; None for a path or a Hub id
    step: int | None  # the checkpoint of `name@step`; None for the newest
    what: str  # `model`, `exported`, `data`, `scores` or `tokenizer`
    revision: str | None = None  # revision on the Hub


def stage_and_step(recipe: Recipe, text: str) -> tuple[AnyStage | None, int | None]:
    """The stage that `NAME` or `NAME@STEP` names, and the step; (None, None) for a path or a Hub id."""
    by_name = {stage.name: stage for stage in recipe.stages}
    if text in by_name:
        return by_name[text], None
    name, _, step = text.rpartition("@")
    return (by_name[name], int(step)) if name in by_name and step.isdigit() else (None, None)


def trained_precision(recipe: Recipe, text: str) -> str | None:
    """The precision that a model was trained in, if `text` names a training stage of the recipe."""
    stage, _ = stage_and_step(recipe, text)
    return stage.precision if isinstance(stage, AnyTraining) else None


def references(recipe: Recipe, stage: AnyStage) -> list[Reference]:
    """The inputs that `stage` takes from other stages, folders or the Hub, in the order of its fields."""
    found = []
    for field, value, what, revision in _fields(stage):
        read, step = stage_and_step(recipe, value)
        if read is not None:
            found.append(Reference(field, value, read.name, step, what))
        else:
            found.append(Reference(field, value, None, None, what, revision))
    return found


class Ancestor(NamedTuple):
    """A stage that a model came through."""

    stage: AnyStage  # the stage of the recipe
    step: int | None  # the checkpoint that was used; None for the newest, or if the stage has no checkpoints


def lineage(recipe: Recipe, name: str) -> tuple[list[Ancestor], str | None]:
    """The stages of the recipe that a model came through, oldest first, and what the oldest started from.

    Returns:
        The stages, and the folder or Hub id that the oldest started from; None if it started from random weights.
    """
    found: list[Ancestor] = []
    reference: str | None = name
    while reference is not None:
        stage, step = stage_and_step(recipe, reference)
        if stage is None:
            break
        found.append(Ancestor(stage, step))
        source = getattr(stage, "model", None)
        reference = source.source if isinstance(source, ModelInput) else source
    return found[::-1], reference


def readers(recipe: Recipe, name: str) -> list[str]:
    """The later stages that read a stage, directly or through other stages, in the recipe's order."""
    found = [name]
    for stage in recipe.stages:  # stages read only earlier ones
        if any(reference.stage in found for reference in references(recipe, stage)):
            found.append(stage.name)
    return found[1:]


def named_steps(recipe: Recipe, name: str) -> frozenset[int]:
    """The steps of a training stage whose checkpoints other stages read as `name@step`."""
    read = [reference for stage in recipe.stages for reference in references(recipe, stage)]
    return frozenset(each.step for each in read if each.stage == name and each.step is not None)


def _fields(stage: AnyStage) -> list[tuple[str, str, str, str | None]]:
    fields: list[tuple[str, str, str, str | None]] = []
    if isinstance(stage, BuildData):
        return [("tokenizer", stage.tokenizer, "tokenizer", None)] if isinstance(stage.tokenizer, str) else []
    for name in ("model", "teacher", "reference", "models", "data", "scores", "tokenizer", "donor"):
        value: Any = getattr(stage, name, None)
        what = {"data": "data", "scores": "scores", "tokenizer": "tokenizer", "donor": "tokenizer"}.get(name, "model")
        if stage.kind in EXPORTED:
            what = "exported"
        if isinstance(value, ModelInput):
            if value.source is not None:
                fields.append((name, value.source, what, value.revision))
        elif isinstance(value, str):
            fields.append((name, value, what, None))
        elif isinstance(value, list):
            fields += [(f"{name}.{index}", text, what, None) for index, text in enumerate(value)]
    return fields


def deepspeed_jsons(stage: AnyStage) -> list[str]:
    """The DeepSpeed JSONs that a stage names, including its defaults."""
    names = [getattr(stage, key, None) for key in ("deepspeed", "reference_deepspeed")]
    names.append(getattr(getattr(stage, "teacher", None), "deepspeed", None))
    return [name for name in names if name is not None]


def sources(stage: AnyStage) -> list[tuple[str, Source]]:
    """The sources of text that a stage reads, each with the key that names it."""
    found: list[tuple[str, Source]] = []
    if isinstance(stage, BuildData):
        found += [(f"sources.{index}", source) for index, source in enumerate(stage.sources)]
    if isinstance(stage, ExpandVocabulary):
        trained_on = stage.donor.sources if isinstance(stage.donor, DonorTraining) else []
        for field, listed in (("donor", trained_on), ("count_on", stage.count_on), ("report_on", stage.report_on)):
            found += [(f"{field}.{index}", source) for index, source in enumerate(listed)]
    return found


def check_references(recipe: Recipe) -> None:
    """Refuse inputs that cannot exist when their stage runs.

    Raises:
        RecipeError: a stage names itself, a later stage, or a stage of a kind that cannot hold what it needs.
    """
    order = {stage.name: index for index, stage in enumerate(recipe.stages)}
    accepted = {
        "model": WEIGHTS,
        "exported": ("export",),
        "data": ("build_data",),
        "scores": ("prune",),
        "tokenizer": ("build_data", *WEIGHTS),
    }
    for index, stage in enumerate(recipe.stages):
        for reference in references(recipe, stage):
            if reference.stage is None:
                continue
            where = f"stages.{stage.name}.{reference.field}: {reference.text!r}"
            if order[reference.stage] >= index:
                raise RecipeError(
                    f"{where} is {'the stage itself' if reference.stage == stage.name else 'a later stage'}",
                    "stages run from top to bottom, so there would be nothing to read",
                    "name an earlier stage, or move the stages",
                )
            kind = recipe.stage(reference.stage).kind
            if kind not in accepted[reference.what]:
                raise RecipeError(
                    f"{where} is a stage of kind {kind}",
                    f"{reference.field} is read from a stage of kind {' or '.join(accepted[reference.what])}",
                    "name one of those, or a folder",
                )
            if reference.step is not None and kind not in STEPPED:
                raise RecipeError(
                    f"{where} asks for a step of a stage of kind {kind}",
                    f"only stages of kind {' and '.join(STEPPED)} leave checkpoints",
                    f"write just {reference.stage!r}",
                )
    for name in ALWAYS_SUMMED:
        written = name != "export" or any(stage.kind == "export" for stage in recipe.stages)
        if name in recipe.summary and written:
            raise RecipeError(
                f"summary.{name}: the summary has its own {name!r}",
                "it would overwrite what the recipe asks for",
                "rename the key",
            )
    _check_summary(recipe, recipe.summary, "summary")


def unread(recipe: Recipe, stage: AnyStage) -> list[str]:
    """Settings of a stage that have no effect; reported, not refused, because stages already begun may have them."""
    found = []
    if isinstance(stage, Distil) and stage.soft_weight == 0 and stage.temperature != 1.0:
        found.append(f"temperature {stage.temperature:g} with soft_weight 0, which gives the teacher no part")
    if isinstance(stage, Distil) and stage.soft_weight == 0:
        placed = sorted(key for key in stage.teacher.model_fields_set if key in (*PLACING, "precision"))
        idle = [key for key in placed if getattr(stage.teacher, key) not in (None, "auto", "none")]
        found += [f"teacher.{key} with soft_weight 0, which loads no teacher" for key in idle]
    if isinstance(stage, AnyTraining) and stage.keep_every_steps and not stage.keep_checkpoints:
        found.append(f"keep_every_steps {stage.keep_every_steps} with keep_checkpoints 0, which keeps all")
    if isinstance(stage, Prune):
        found += _unread_by_pruning(stage)
    for field, value in stage:
        if not isinstance(value, ModelInput):
            continue
        if value.revision is not None and stage_and_step(recipe, value.source or "")[0] is not None:
            found.append(f"{field}.revision {value.revision!r} with a stage of the recipe")
        if value.random is not None:
            idle = [key for key in ("revision", "shape") if getattr(value, key) is not None]
            found += [f"{field}.{key} with random weights" for key in idle]
    return found


def _unread_by_pruning(stage: Prune) -> list[str]:
    """Settings of a prune stage that its kind of score, or its target, leaves without effect."""
    fields = type(stage).model_fields  # a run's saved recipe spells out the defaults, so these count as not given
    given = {name for name in fields if getattr(stage, name) != fields[name].default}
    why = "scores that are reused" if stage.scores is not None else f"score {stage.score}"
    idle = {"seed"} if stage.scores is not None or stage.score == "magnitude" else set()
    if stage.scores is not None or stage.score != "gradient":
        idle |= {"sequences", "micro_batch_sequences", "sequence_length", "precision", "deepspeed"}
    found = [f"{name} with {why}" for name in sorted(idle & given)]
    target = stage.target
    if stage.depth == "importance" and target.num_layers is None:
        found.append("depth importance with a target that keeps all layers")
    if stage.norm_compensation == "rms" and target.hidden_size is None and target.sparsity is None:
        found.append("norm_compensation rms with a target that keeps the whole width")
    return found


def _check_summary(recipe: Recipe, value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_summary(recipe, inner, f"{where}.{key}")
        return
    if value == []:
        raise RecipeError(
            f"{where} is an empty list",
            "there would be nothing to average at the end of the run",
            "name at least one STAGE.metric in it, or remove the key",
        )
    for text in value if isinstance(value, list) else [value]:
        _check_metric(recipe, text, where)


def _check_metric(recipe: Recipe, text: Any, where: str) -> None:
    named = [stage for stage in recipe.stages if isinstance(text, str) and text.startswith(f"{stage.name}.")]
    if not named:
        raise RecipeError(
            f"{where}: {text!r} names no stage's metric",
            "summary.json could not be written at the end of the run",
            "write STAGE.metric (for example teacher.parameters), or a list of them to average",
        )
    stage = max(named, key=lambda stage: len(stage.name))  # names may contain points, so the longest is meant
    if not isinstance(stage, Evaluate):
        return
    metric = text.removeprefix(f"{stage.name}.")
    if not any(metric == model or metric.startswith(f"{model}.") for model in stage.models):
        raise RecipeError(
            f"{where}: {text!r} names no model of stage {stage.name!r}{nearest(metric.split('.')[0], stage.models)}",
            "summary.json could not be written at the end of the run",
            f"write {stage.name}.MODEL.metric with one of {', '.join(stage.models)}, or add the model to the stage",
        )

"""Checks that a stage can read its data and run its models, as far as that is known before any is made. No torch."""

from minima.errors import DataError, RecipeError, ShapeError, StageError, UnsupportedFamily
from minima.models.shape import ModelShape
from minima.planning.candidates import impossible, never_splits
from minima.recipe.references import FORMATS_READ
from minima.recipe.schema import AnyStage, AnyTraining, Distil, Prune, Recipe
from minima.stages.preview.known_inputs import KnownInputs

TOO_LATE = "the run would fail at this stage, after running all stages before it"


def measures(stage: Prune) -> bool:
    """Whether a prune stage reads its data's blocks; otherwise it takes only the tokenizer from there."""
    return stage.score == "gradient" and stage.scores is None


def check_known_format(known: KnownInputs, stage: AnyStage) -> None:
    """Refuse data in a format that the stage does not read.

    Raises:
        DataError: names the data and its format.
    """
    formats, name = FORMATS_READ.get(stage.kind, ()), getattr(stage, "data", None)
    tokenizer_only = isinstance(stage, Prune) and not measures(stage)
    data = known.data_stage(name) if name is not None and not tokenizer_only else None
    if data is None or data.format in formats:
        return
    raise DataError(
        f"stages.{stage.name}.data: {name!r} contains {data.format}, but a stage of kind "
        f"{stage.kind} reads {' or '.join(formats)}",
        TOO_LATE,
        f"name a build_data stage with `format: {formats[-1]}`",
    )


def check_positions(
    known: KnownInputs, stage: str, data: str, shape: ModelShape | None, limit: int | None = None, part: str = "train"
) -> None:
    """Refuse data that is longer than a model's maximum number of positions.

    Args:
        shape: the model's; None if it is not known.
        limit: how many tokens of a block are used; None for all.
        part: of the data, which the stage reads: `train` or `held_out`.

    Raises:
        RecipeError: says how long they are.
    """
    longest, length = known.longest(data, part), known.length(data)
    if not longest or shape is None or min(limit or longest, longest) <= shape.max_positions:
        return
    what = "blocks" if longest == length else "documents"
    raise RecipeError(
        f"stages.{stage}: {what} of {min(limit or longest, longest):,} tokens for a model of {shape.max_positions:,} "
        "positions",
        "it has no positions for the rest of the tokens",
        f"build the data with a sequence_length of at most {shape.max_positions:,}; a prune stage can have its own",
    )


def check_models(known: KnownInputs, stage: AnyTraining) -> str:
    """Refuse what the stage's models, the trained and the frozen one, are known to be unable to do.

    Returns:
        Why the teacher's placement is impossible on one machine of the planned ranks; empty if it is possible, or if
        there is no teacher or its shape is not known.

    Raises:
        RecipeError: the data is longer than a model's positions.
        UnsupportedFamily: `kernels: liger` would replace nothing.
        ShapeError: the teacher cannot be split as the recipe asks for, on any machine.
    """
    shape, teacher = (None if model is None else known.structure(model) for model in (stage.model, stage.frozen_model))
    for model in filter(None, (shape, teacher)):
        check_positions(known, stage.name, stage.data, model)
        if stage.kernels == "liger" and model.family in ("gpt_neox", "gpt2"):
            raise UnsupportedFamily(
                f"stages.{stage.name}: kernels: liger for a {model.family} model",
                "it has neither RMSNorms nor SwiGLUs, so the key would change nothing",
                "set kernels: stock; with compile: true its norms and activations are fused as well",
            )
    if not isinstance(stage, Distil) or teacher is None or stage.teacher.placement != "tensor_parallel":
        return ""
    if problem := never_splits(teacher, stage.teacher.tensor_parallel_ranks):
        raise ShapeError(
            f"stages.{stage.name}.teacher: placement tensor_parallel is impossible: {problem}",
            TOO_LATE,
            "use placement zero3_node, which needs as little memory, or set tensor_parallel_ranks to a number that "
            "divides the heads",
        )
    return impossible(stage.teacher, teacher, known.ranks)


def check_known_scores(recipe: Recipe, stage: Prune, length: int | None) -> None:
    """Refuse reused scores of another kind, and blocks that would have to be longer than the data's.

    Args:
        length: tokens per block of the stage's data; None if it has none, or if it is not known.

    Raises:
        StageError, ShapeError: names both kinds, or both lengths.
    """
    made = {each.name: each for each in recipe.stages if isinstance(each, Prune)}.get(stage.scores or "")
    if made is not None and made.score != stage.score:
        raise StageError(
            f"stages.{stage.name}: score is {stage.score}, but the scores of {made.name!r} are of kind {made.score}",
            "scores are valid only for the model and the kind that they were computed for",
            f"set score: {made.score}, or omit `scores:` to compute them again",
        )
    if measures(stage) and length is not None and (stage.sequence_length or 0) > length:
        raise ShapeError(
            f"stages.{stage.name}: sequence_length {stage.sequence_length} from blocks of {length} tokens",
            "a block can be shortened, but not lengthened",
            f"choose at most {length}, or omit it",
        )

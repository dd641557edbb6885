"""The build_data stage: turns text, conversations or preferences into token blocks.

It runs as one process without ranks, which starts its own workers. A large build can be divided into parts, each a
process on its own machine: see `encode_part`.
"""

import shutil
from pathlib import Path
from typing import Any

from minima.data.builder import build, processes_of
from minima.data.parts.building import build_part, is_recorded
from minima.data.parts.files import PARTS, Part
from minima.data.parts.merging import RecordedParts
from minima.disk import write_json
from minima.models.checksums import verify_tokenizer
from minima.models.layout import VOCABULARY_FILES
from minima.recipe.data import TokenizerTraining
from minima.recipe.schema import BuildData, Evaluate, Recipe
from minima.stages.context import StageContext
from minima.stages.manifest import STARTED, read_manifest


def run(context: StageContext) -> dict[str, Any]:
    """Write `tokenizer/`, `train/`, `held_out/` and `report.json`; if there are parts, by merging them.

    Returns:
        Metrics: documents, tokens, blocks, dropped and held-out tokens, rejected records by reason, tokens per
        character, bytes per token, `unigram_entropy` of the held-out tokens in nats, seconds (including those of all
        parts), and for each source its documents, tokens, share and epochs. For conversations and pairs also their
        number (`conversations` or `pairs`; the prefix `held_out_` marks those set aside), `learnt_tokens`,
        `padding_tokens`, `padding_share`, `cut_conversations` (longer than a block) and `unanswered_turns` (dropped at
        the end of a conversation); the entropy then covers only the tokens to be learnt.
    """
    stage = context.stage
    assert isinstance(stage, BuildData)
    folder = context.folder / PARTS
    if not folder.is_dir():
        return build(stage, context.folder, _tokenizer(context, stage), evaluated=_is_evaluated(context.recipe, stage))
    command = f"minima stage {context.recipe_path} --stages {stage.name} --part"
    started = read_manifest(context.folder, STARTED)
    parts = RecordedParts(folder, started["identity"], command, processes_of(stage))
    evaluated = _is_evaluated(context.recipe, stage)
    metrics = build(stage, context.folder, _tokenizer(context, stage), parts, evaluated=evaluated)
    earlier_seconds = started.get("earlier_seconds", 0.0) + parts.seconds
    write_json(context.folder / STARTED, started | {"earlier_seconds": round(earlier_seconds, 3)})
    return metrics


def _is_evaluated(recipe: Recipe, stage: BuildData) -> bool:
    """Whether any stage of the recipe evaluates on the data's held-out part."""
    reading = [each for each in recipe.stages if getattr(each, "data", None) == stage.name]
    return any(isinstance(each, Evaluate) or getattr(each, "evaluate_every_steps", 0) for each in reading)


def tidy(context: StageContext) -> None:
    """Remove the parts once the merged result is published."""
    shutil.rmtree(context.folder / PARTS, ignore_errors=True)


def encode_part(context: StageContext, part: tuple[int, int]) -> str:
    """Encode one part, unless it is already complete.

    Args:
        context: of the stage; its folder has a `started.json`.
        part: number of the part, from 0, and the number of parts.

    Returns:
        The outcome, as a line for the user.
    """
    stage, folder, one = context.stage, context.folder / PARTS, Part(*part)
    assert isinstance(stage, BuildData)
    identity = read_manifest(context.folder, STARTED)["identity"]
    if is_recorded(folder / one.name, identity):
        return f"part {one} of stage {stage.name} was already finished"
    counts = build_part(stage, folder, _tokenizer(context, stage), one, identity)
    return (
        f"part {one} of stage {stage.name} finished in {counts['seconds']:.1f} s: {counts['documents']} documents, "
        f"{counts['tokens']} tokens"
    )


def lock_folder(folder: Path, part: tuple[int, int]) -> Path:
    """The path of one part's lock in a stage's folder."""
    return folder / PARTS / "locks" / Part(*part).name


def _tokenizer(context: StageContext, stage: BuildData) -> str | Path | TokenizerTraining:
    """The tokenizer to use: how to train one, the folder of an earlier stage's tokenizer, or a folder or Hub id."""
    if isinstance(stage.tokenizer, TokenizerTraining):
        return stage.tokenizer
    if any(other.name == stage.tokenizer and isinstance(other, BuildData) for other in context.recipe.stages):
        return context.data(stage.tokenizer) / "tokenizer"
    if any(other.name == stage.tokenizer for other in context.recipe.stages):
        resolved = context.model(stage.tokenizer)
        return resolved.tokenizer or resolved.folder
    path = Path(stage.tokenizer).expanduser()
    if path.is_dir() and not any((path / name).is_file() for name in VOCABULARY_FILES):  # a stage given by path
        verify_tokenizer(path)
        return next((path / inner for inner in ("tokenizer", "model") if (path / inner).is_dir()), path)
    return stage.tokenizer

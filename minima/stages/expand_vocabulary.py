"""The expand_vocabulary stage: adds another tokenizer's pieces to a model's, with rows in its embedding and head."""

import logging
import shutil
from pathlib import Path
from typing import Any

from minima.data.tokenizer import check_vocabulary
from minima.data.vocabularies.growing import expand, open_base
from minima.disk import whole_or_gone, write_json
from minima.errors import DataError, TokenizerMismatch
from minima.models.embeddings import GrownSource
from minima.models.families import shape_of
from minima.models.shape import ModelShape
from minima.models.weights import write_folder
from minima.recipe.references import stage_and_step
from minima.recipe.schema import BuildData
from minima.recipe.vocabulary import DonorTraining, ExpandVocabulary
from minima.stages.context import StageContext
from minima.stages.export import copy_tokenizer
from minima.stages.hub import snapshot
from minima.stages.origin import Origin, open_origin

logger = logging.getLogger(__name__)


def run(context: StageContext) -> dict[str, Any]:
    """Write `model/` (Hugging Face layout, with the grown tokenizer) and `report.json`.

    Only one tensor is in memory at a time. Rows beyond the tokenizer's ids are the model's padding; new pieces use
    these first.

    Returns:
        `vocabulary_before` and `vocabulary` (rows), `pieces_before`, `pieces`, `pieces_added`, `reserved` (rows without
        a piece), `left_out` (the donor's rejected pieces by reason), `tokens_per_character` (`before` and `after` for
        each source of `report_on`), `parameters_before` and `parameters`.

    Raises:
        DataError: a tokenizer or a text cannot be read, or no piece passes the filters.
        TokenizerMismatch: base and donor, or model and base, do not belong together.
        ShapeError: the requested size leaves no room for new pieces.
        DiskFull: there is no space for the model; what was written of it is removed.
    """
    stage = context.stage
    assert isinstance(stage, ExpandVocabulary)
    origin = open_origin(context, stage.model, stage.seed)
    rows = shape_of(origin.source.config).vocabulary_size
    base = open_base(_base(context, stage, origin))
    check_vocabulary(base.size, rows, str(base.folder), origin.identity)
    donor = stage.donor if isinstance(stage.donor, DonorTraining) else _tokenizer(context, stage.donor)
    model, tokenizer = context.folder / "model", context.folder / "tokenizer.partial"
    with whole_or_gone(model), whole_or_gone(tokenizer):
        grown = expand(stage, base, donor, rows, tokenizer)
        source = GrownSource(origin.source, grown.size, grown.first, grown.origins)
        write_folder(model, source.config, ((name, source.read(name)) for name in source.names()))
        copy_tokenizer(tokenizer, model)
        shutil.rmtree(tokenizer)
        metrics = grown.metrics | {
            "parameters_before": ModelShape.from_config(origin.source.config).parameters,
            "parameters": ModelShape.from_folder(model).parameters,
        }
        write_json(context.folder / "report.json", metrics)
    logger.info("%d pieces added, %d rows now", metrics["pieces_added"], metrics["vocabulary"])
    for label, length in metrics["tokens_per_character"].items():
        logger.info("tokens per character of %s: %.4f before, %.4f after", label, length["before"], length["after"])
    return metrics


def _base(context: StageContext, stage: ExpandVocabulary, origin: Origin) -> Path:
    """The folder of the tokenizer to be extended."""
    if stage.tokenizer is not None:
        return _tokenizer(context, stage.tokenizer)
    if origin.tokenizer is None:
        raise TokenizerMismatch(
            f"{origin.identity} has no tokenizer",
            "there is nothing to add pieces to",
            "name the stage or the folder of the model's tokenizer with `tokenizer:`",
        )
    return origin.tokenizer


def _tokenizer(context: StageContext, text: str) -> Path:
    """The path of a tokenizer: an earlier stage's, a file, a folder, or a download from the Hub without weights."""
    stage, _ = stage_and_step(context.recipe, text)
    path = Path(text).expanduser()
    if isinstance(stage, BuildData):
        return context.data(text) / "tokenizer"
    if stage is not None or path.is_dir():
        resolved = context.model(text)
        return resolved.tokenizer or resolved.folder
    if path.suffix in (".model", ".json") and not path.is_file():  # a file name, not a Hub id
        raise DataError(
            f"there is no file {text!r}",
            f"stage {context.stage.name!r} reads a tokenizer's pieces from it",
            "give the path of a tokenizer.model or a tokenizer.json, a folder that contains one, or a Hub id",
        )
    return path if path.is_file() else snapshot(text, None, context.run_folder, keep=True, weights=False)

"""The model that a stage starts from, and checks that the data fits it."""

import logging
from dataclasses import dataclass
from pathlib import Path

from minima.data.chats.template_choice import other_format
from minima.data.store import TokenStore
from minima.data.tokenizer import check_same_tokens, check_vocabulary
from minima.engine import distributed
from minima.engine.weights import open_weights
from minima.errors import DataError, ShapeError, TokenizerMismatch
from minima.models.shape import ModelShape
from minima.models.weights import RandomSource, WeightSource
from minima.planning.units import size_text
from minima.recipe.base import ModelInput
from minima.recipe.references import FORMATS_READ, references
from minima.recipe.schema import AnyTraining
from minima.stages.context import StageContext

logger = logging.getLogger(__name__)
_TOLD_BYTES = 4e9  # reading this much takes one rank some seconds, so it is logged


@dataclass(frozen=True)
class Origin:
    """A model that a stage starts from."""

    source: WeightSource  # its weights
    identity: str  # its name in checkpoints and cards
    tokenizer: Path | None  # folder of its tokenizer; None if it has none


def open_origin(context: StageContext, model: ModelInput, seed: int = 0) -> Origin:
    """Open the weights that the recipe names.

    Raises:
        ShapeError: the recipe's `shape:` does not match the model.
    """
    if model.random is not None:
        return Origin(RandomSource(model.random.to_config(), seed), f"random weights, seed {seed}", None)
    resolved = context.model(model)
    source = open_weights(resolved.folder, resolved.step)
    if model.shape is not None and (other := model.check_shape(ModelShape.from_config(source.config), resolved.name)):
        logger.warning("%s: %s; a plan made from its `shape:` alone was for another size", resolved.name, other)
    return Origin(source, resolved.name, resolved.tokenizer)


def warn_of_same_blocks(context: StageContext, stage: AnyTraining) -> None:
    """Warn if a stage continues from a training stage and would read the same blocks again in the same order."""
    for reference in references(context.recipe, stage):
        before = context.recipe.stage(reference.stage) if reference.stage and reference.field == "model" else None
        if isinstance(before, AnyTraining) and (before.data, before.seed) == (stage.data, stage.seed):
            logger.warning(
                "%s: reads the blocks of %s in the same order as %s, which it continues from (seed %d); "
                "give it another `seed:` to start with other blocks",
                stage.name, stage.data, before.name, stage.seed,
            )  # fmt: skip


def open_store(folder: Path) -> TokenStore:
    """Open a token store and verify its checksums; every rank calls it, and they share the reading.

    Raises:
        DataError: there is no store.
        StoreCorrupted: a file is missing or damaged; names it.
    """
    with distributed.refused_together():
        store = TokenStore.open(folder)
        if store.file_bytes >= _TOLD_BYTES and distributed.is_main():
            logger.info("%s: reading all %s once to verify checksums", folder, size_text(store.file_bytes))
        store.verify(*distributed.share())
    return store


def check_has_tokenizer(data: Path) -> None:
    """Refuse data that has lost its tokenizer, because a trained model is stored with it; every rank calls it.

    Args:
        data: a build_data stage's folder.

    Raises:
        DataError: names the folder that is missing.
    """
    with distributed.refused_together():
        if distributed.is_main() and not (data / "tokenizer").is_dir():
            raise DataError(
                f"there is no folder {data / 'tokenizer'}",
                "a training stage stores the tokenizer of its data with the model, which nobody can use without one",
                "restore the folder, or build the data again",
            )


def check_tokens(data: Path, own: Path | None, model: str) -> None:
    """Refuse data that was built with another tokenizer than the model's own; every rank calls it.

    Args:
        data: a build_data stage's folder.
        own: folder of the model's tokenizer; if None, nothing is refused.

    Raises:
        TokenizerMismatch: names the first id that differs.
    """
    with distributed.refused_together():
        if own is not None and (data / "tokenizer").is_dir() and distributed.is_main():
            check_same_tokens(data / "tokenizer", own, model)


def check_template(context: StageContext, data: Path, model: ModelInput, *, refuse: bool) -> None:
    """Compare a store's conversation format with the chat template of the model's tokenizer; every rank calls it.

    Args:
        data: a build_data stage's folder; if its format is text, nothing is compared.
        model: if its tokenizer has no chat template, nothing is compared.
        refuse: whether a difference is an error. Otherwise it is a warning, because a tokenizer can have a template
            that the model was never trained on, and tuning may teach it another one.

    Raises:
        TokenizerMismatch: they differ, and `refuse` is set.
    """
    own = None if model.random is not None else context.model(model).tokenizer
    compared = own is not None and (data / "tokenizer").is_dir() and TokenStore.open(data / "train").format != "text"
    with distributed.refused_together():
        if own is None or not compared or not distributed.is_main():
            return
        found = other_format(data / "tokenizer", own)
        if found is None:
            return
        what = f"the conversations in {data} are not in the format of {model.source}: {found}"
        why = "the model would be trained in, and then answer in, another format than the one it knows"
        if refuse:
            raise TokenizerMismatch(what, why, "build the data with that model's tokenizer and `chat_template: own`")
        logger.warning("%s; %s. Set `chat_template: own` if that is not what you want", what, why)


def check_format(store: TokenStore, kind: str) -> None:
    """Refuse data in a format that a stage of this kind does not read.

    Raises:
        DataError: names the store and its format.
    """
    if store.format not in (accepted := FORMATS_READ[kind]):
        raise DataError(
            f"{store.folder} contains {store.format}, but a stage of kind {kind} reads {' or '.join(accepted)}",
            "its loss is not defined for this format",
            f"name a build_data stage with `format: {accepted[-1]}`",
        )


def check_fit(shape: ModelShape, store: TokenStore, model: str, sequence_length: int | None = None) -> None:
    """Refuse data that the model cannot read.

    Args:
        sequence_length: how many tokens of a block are used; None for all.

    Raises:
        TokenizerMismatch: the store has token ids that the model does not know.
        ShapeError: its blocks are longer than the model's maximum number of positions.
    """
    check_vocabulary(store.vocabulary_size, shape.vocabulary_size, str(store.folder), model)
    length = min(sequence_length or store.sequence_length, store.longest)
    if length > shape.max_positions:
        raise ShapeError(
            f"{'documents' if store.document_mask else 'blocks'} of {length} tokens for {model}, which has "
            f"{shape.max_positions} positions",
            "it was not trained for longer positions",
            f"build the data with sequence_length {shape.max_positions} or less",
        )

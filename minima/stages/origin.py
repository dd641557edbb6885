"""The model that a stage starts from, and whether the data fits it."""

import logging
from dataclasses import dataclass
from pathlib import Path

from minima.data.store import TokenStore
from minima.data.template_choice import other_format
from minima.data.tokenizer import check_same_tokens, check_vocabulary
from minima.engine import distributed
from minima.engine.weights import open_weights
from minima.errors import DataError, ShapeError, TokenizerMismatch
from minima.models.shape import ModelShape
from minima.models.weights import RandomSource, WeightSource
from minima.planning.units import size_text
from minima.recipe.base import ModelInput
from minima.recipe.references import references
from minima.recipe.schema import AnyTraining
from minima.stages.context import StageContext

logger = logging.getLogger(__name__)
_TOLD_BYTES = 4e9  # some seconds on one rank
LEARNABLE = ("text", "conversations")  # formats of data whose tokens have a loss of their own


@dataclass(frozen=True)
class Origin:
    """A model that a stage starts from.

    Attributes:
        source: its weights.
        identity: what checkpoints and cards call it.
        tokenizer: folder of its tokenizer; none when it has none.
    """

    source: WeightSource
    identity: str
    tokenizer: Path | None


def open_origin(context: StageContext, model: ModelInput, seed: int = 0) -> Origin:
    """The weights that the recipe names.

    Raises:
        ShapeError: the recipe's `shape:` is not the model's.
    """
    if model.random is not None:
        return Origin(RandomSource(model.random.to_config(), seed), f"random weights, seed {seed}", None)
    resolved = context.model(model)
    source = open_weights(resolved.folder, resolved.step)
    if model.shape is not None and (other := model.check_shape(ModelShape.from_config(source.config), resolved.name)):
        logger.warning("%s: %s; what was planned by its `shape:` alone was of another size", resolved.name, other)
    return Origin(source, resolved.name, resolved.tokenizer)


def warn_of_same_blocks(context: StageContext, stage: AnyTraining) -> None:
    """Tell where a stage goes on from a training stage and would read its blocks again in the same order."""
    for reference in references(context.recipe, stage):
        before = context.recipe.stage(reference.stage) if reference.stage and reference.field == "model" else None
        if isinstance(before, AnyTraining) and (before.data, before.seed) == (stage.data, stage.seed):
            logger.warning(
                "%s: reads the blocks of %s in the same order as %s, which it goes on from, has read them (seed %d); "
                "give it a `seed:` of its own to have others first",
                stage.name, stage.data, before.name, stage.seed,
            )  # fmt: skip


def open_store(folder: Path) -> TokenStore:
    """A token store whose bytes are those that were written; every rank calls it, and they share the reading.

    Raises:
        DataError: there is no store.
        StoreCorrupted: a file is missing or damaged; names it.
    """
    with distributed.refused_together():
        store = TokenStore.open(folder)
        if store.file_bytes >= _TOLD_BYTES and distributed.is_main():
            logger.info("%s: reading all %s once, to compare checksums", folder, size_text(store.file_bytes))
        store.verify(*distributed.share())
    return store


def check_tokens(data: Path, own: Path | None, model: str) -> None:
    """Refuse data that was made with another tokenizer than the model's own; every rank calls it.

    Args:
        data: a build_data stage's folder.
        own: folder of the model's tokenizer; none when it has none, and nothing is refused then.
        model: what to call the model.

    Raises:
        TokenizerMismatch: names the first id that differs.
    """
    with distributed.refused_together():
        if own is not None and (data / "tokenizer").is_dir() and distributed.is_main():
            check_same_tokens(data / "tokenizer", own, model)


def check_template(context: StageContext, data: Path, model: ModelInput, *, refuse: bool) -> None:
    """Compare how conversations are written in a store and by the model's own tokenizer; every rank calls it.

    Args:
        context: of the stage.
        data: a build_data stage's folder; of text, nothing is compared.
        model: whose tokenizer may have a chat template; nothing is compared where it has none.
        refuse: whether a difference is an error; it is a warning otherwise: a model's tokenizer can have a template
            that the model was never taught, and tuning is how it is taught another one.

    Raises:
        TokenizerMismatch: they differ, and that is an error.
    """
    own = None if model.random is not None else context.model(model).tokenizer
    compared = own is not None and (data / "tokenizer").is_dir() and TokenStore.open(data / "train").format != "text"
    with distributed.refused_together():
        if own is None or not compared or not distributed.is_main():
            return
        found = other_format(data / "tokenizer", own)
        if found is None:
            return
        what = f"the conversations in {data} are not written as {model.source} writes them: {found}"
        why = "the model would be trained, and answer afterwards, in another format than the one it knows"
        if refuse:
            raise TokenizerMismatch(
                what, why, "build the data with the tokenizer of that model and `chat_template: own`"
            )
        logger.warning("%s; %s. Set `chat_template: own` if that is not what you want", what, why)


def check_format(store: TokenStore, kind: str, accepted: tuple[str, ...]) -> None:
    """Refuse data of another kind than a stage reads.

    Raises:
        DataError: names the store and its format.
    """
    if store.format not in accepted:
        raise DataError(
            f"{store.folder} holds {store.format}, and a stage of kind {kind} reads {' or '.join(accepted)}",
            "its loss is not made for them",
            f"name a build_data stage with `format: {accepted[-1]}`",
        )


def check_fit(shape: ModelShape, store: TokenStore, model: str, sequence_length: int | None = None) -> None:
    """Refuse data that the model cannot read.

    Args:
        shape: of the model.
        store: the data.
        model: what to call the model.
        sequence_length: tokens of a block that are used; all when not given.

    Raises:
        TokenizerMismatch: the store has token ids that the model does not know.
        ShapeError: its blocks are longer than the model's positions.
    """
    check_vocabulary(store.vocabulary_size, shape.vocabulary_size, str(store.folder), model)
    length = min(sequence_length or store.sequence_length, store.longest)
    if length > shape.max_positions:
        raise ShapeError(
            f"{'documents' if store.document_mask else 'blocks'} of {length} tokens for {model}, made for "
            f"{shape.max_positions} positions",
            "beyond them its positions mean nothing to it",
            f"build the data with sequence_length {shape.max_positions} or less",
        )

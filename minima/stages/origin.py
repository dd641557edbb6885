"""The model that a stage starts from, and whether the data fits it."""

from dataclasses import dataclass
from pathlib import Path

from minima.data.store import TokenStore
from minima.data.tokenizer import check_same_tokens, check_vocabulary
from minima.engine import distributed
from minima.engine.weights import open_weights
from minima.errors import DataError, MinimaError, ShapeError
from minima.models.shape import ModelShape
from minima.models.weights import RandomSource, WeightSource
from minima.recipe.base import ModelInput
from minima.stages.context import StageContext

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


def open_origin(context: StageContext, model: ModelInput, seed: int) -> Origin:
    """The weights that the recipe names.

    Raises:
        ShapeError: the recipe's `shape:` is not the model's.
    """
    if model.random is not None:
        return Origin(RandomSource(model.random.to_config(), seed), f"random weights, seed {seed}", None)
    resolved = context.model(model)
    source = open_weights(resolved.folder, resolved.step)
    if model.shape is not None:
        found = ModelShape.from_config(source.config)
        wrong = [
            f"{name} is {getattr(found, name)}, the recipe says {getattr(model.shape, name)}"
            for name in ("family", "vocabulary_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
            if getattr(found, name) != getattr(model.shape, name)
        ]
        if wrong:
            raise ShapeError(
                f"{resolved.name}: {'; '.join(wrong)}",
                "the run was planned for another model",
                "correct the recipe's `shape:` block, or name the model that it describes",
            )
    return Origin(source, resolved.name, resolved.tokenizer)


def open_store(folder: Path) -> TokenStore:
    """A token store whose bytes are those that were written; every rank calls it, and they share the reading.

    Raises:
        DataError: there is no store.
        StoreCorrupted: a file is missing or damaged; names it.
    """
    error: MinimaError | None = None
    store = None
    try:
        store = TokenStore.open(folder)
        store.verify(*distributed.share())
    except MinimaError as found:
        error = found
    distributed.raise_together(error)
    assert store is not None
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
    error: MinimaError | None = None
    if own is not None and (data / "tokenizer").is_dir() and distributed.share()[0] == 0:
        try:
            check_same_tokens(data / "tokenizer", own, model)
        except MinimaError as found:
            error = found
    distributed.raise_together(error)


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

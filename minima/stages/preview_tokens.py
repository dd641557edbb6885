"""Whether data and a model have the same tokens, as far as it is known before either is made. No torch."""

import json
from pathlib import Path
from typing import NamedTuple

from minima.errors import TokenizerMismatch
from minima.models.layout import VOCABULARY_FILES
from minima.recipe.references import stage_and_step
from minima.recipe.schema import AnyStage, AnyTraining, BuildData, ExpandVocabulary, ModelInput, Recipe
from minima.stages.manifest import is_finished
from minima.stages.preview_inputs import cached_config


class _Origin(NamedTuple):
    """Where a tokenizer comes from.

    Attributes:
        stage: that trains or grows it.
        trained: how many ids the stage trains; 0 for a grown one.
        outside: what is no stage of the recipe.
        revision: of a Hub id.
    """

    stage: str | None
    trained: int = 0
    outside: str = ""
    revision: str | None = None


def check_known_tokens(recipe: Recipe, stage: AnyStage, folder: Path) -> None:
    """Refuse data whose tokenizer is known not to be that of a model that reads it: building it could take days.

    What cannot be told here, since a tokenizer is not on this machine or is no tokenizer.json, is left to the stage.

    Args:
        recipe: the whole run.
        stage: may read data and models.
        folder: of the run.

    Raises:
        TokenizerMismatch: the recipe trains a tokenizer of another size than the model's own; or an id stands for
            something else in the two, which is named.
    """
    data = getattr(stage, "data", None)
    if data is None or is_finished(folder / stage.name):
        return
    models: list[ModelInput | str | None] = [*getattr(stage, "models", ()), getattr(stage, "model", None)]
    models.append(stage.frozen_model if isinstance(stage, AnyTraining) else getattr(stage, "teacher", None))
    for model in models:
        if model is not None:
            _check(recipe, stage.name, data, model, folder)


def _check(recipe: Recipe, stage: str, data: str, model: ModelInput | str, run_folder: Path) -> None:
    ours = _origin(recipe, data)
    theirs = _origin(recipe, model if isinstance(model, str) else model.source or data, model)
    own = _folder(theirs) if theirs.stage is None and theirs.outside != ours.outside else None
    if own is None:
        return
    known = _pieces(own)
    folder = _folder(ours) if ours.stage is None else run_folder / ours.stage / "tokenizer"
    pieces = {} if folder is None else _pieces(folder)
    if ours.trained and not pieces and known and 1 + max(known) != ours.trained:
        raise TokenizerMismatch(
            f"stages.{stage}: {ours.stage!r} trains a tokenizer of {ours.trained:,} ids for its data, and "
            f"{theirs.outside} has one of its own, of {1 + max(known):,}",
            "the model would read other words than the text has",
            f"give the build_data stage `tokenizer: {theirs.outside}`, and add what it lacks by an expand_vocabulary "
            "stage",
        )
    for number, piece in sorted(pieces.items()):
        if known.get(number, piece) != piece:
            raise TokenizerMismatch(
                f"stages.{stage}: id {number} is {piece!r} in the data's tokenizer {ours.outside or folder} and "
                f"{known[number]!r} in that of {theirs.outside}",
                "the model would read other words than the text has",
                f"give the build_data stage the model's own tokenizer (`tokenizer: {theirs.outside}`)",
            )


def _origin(recipe: Recipe, reference: str, model: ModelInput | str = "") -> _Origin:
    """Follow models and data back to the tokenizer that they came with."""
    revision = model.revision if isinstance(model, ModelInput) else None
    while True:
        stage, _ = stage_and_step(recipe, reference)
        if stage is None:
            return _Origin(None, outside=reference, revision=revision)
        if isinstance(stage, ExpandVocabulary):
            return _Origin(stage.name)
        source = stage.tokenizer if isinstance(stage, BuildData) else getattr(stage, "model", None)
        if isinstance(source, ModelInput):
            revision = source.revision
            source = source.source or getattr(stage, "data", None)  # random weights go with their data
        if not isinstance(source, str):
            return _Origin(stage.name, getattr(source, "vocabulary_size", 0))
        reference = source


def _folder(origin: _Origin) -> Path | None:
    """Where a tokenizer from outside lies on this machine."""
    path = Path(origin.outside).expanduser()
    config = None if path.is_dir() else cached_config(origin.outside, origin.revision)
    places = [config.parent] if config else [path, path / "tokenizer", path / "model"]
    return next((place for place in places if any((place / name).is_file() for name in VOCABULARY_FILES)), None)


def _pieces(folder: Path) -> dict[int, str]:
    """What each id stands for by a tokenizer.json; nothing where there is none, or not of that form."""
    try:
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        pieces = tokenizer["model"]["vocab"]
        if isinstance(pieces, dict):
            found = {number: piece for piece, number in pieces.items()}
        else:
            found = dict(enumerate(piece for piece, _ in pieces))
        return found | {added["id"]: added["content"] for added in tokenizer["added_tokens"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}

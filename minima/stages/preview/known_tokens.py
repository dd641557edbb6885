"""Checks that data and models have the same tokens, as far as that is known before any is made. No torch."""

import json
from pathlib import Path
from typing import NamedTuple

from minima.errors import TokenizerMismatch, VocabularyMismatch
from minima.models.layout import VOCABULARY_FILES
from minima.models.shape import ModelShape
from minima.recipe.references import lineage, stage_and_step
from minima.recipe.schema import AnyStage, AnyTraining, BuildData, Distil, ExpandVocabulary, ModelInput, Recipe
from minima.stages.manifest import is_finished
from minima.stages.preview.known_inputs import cached_config

_MOST_PADDING = 1024  # rows; in the known families, models with the same tokenizer differ by at most 384 (Pythia)


class _Origin(NamedTuple):
    """Where a tokenizer comes from."""

    stage: str | None  # the stage that trains or extends it
    trained: int = 0  # the number of ids that the stage trains; 0 for an extended tokenizer
    outside: str = ""  # a path or Hub id outside the recipe
    revision: str | None = None  # of a Hub id


def check_known_tokens(recipe: Recipe, stage: AnyStage, folder: Path) -> None:
    """Refuse data whose tokenizer is known to differ from that of a model that reads it: building it could take days.

    If this cannot be decided here, because a tokenizer is not on this machine or has no tokenizer.json, the stage
    itself checks it.

    Raises:
        TokenizerMismatch: the recipe trains a tokenizer of another size than the model's own, or an id stands for
            different pieces in the two; names both.
    """
    data = getattr(stage, "data", None)
    if data is None or is_finished(folder / stage.name):
        return
    models: list[ModelInput | str | None] = [*getattr(stage, "models", ()), getattr(stage, "model", None)]
    models.append(stage.frozen_model if isinstance(stage, AnyTraining) else getattr(stage, "teacher", None))
    for model in models:
        if model is not None:
            _check(recipe, stage.name, data, model, folder)


def check_trained_tokenizer(recipe: Recipe, stage: str, reference: str, shape: ModelShape, who: str = "model") -> None:
    """Refuse data whose tokenizer, trained by the recipe, has more ids than the stage's model has rows.

    Raises:
        TokenizerMismatch: names both sizes.
    """
    own = {each.name: each for each in recipe.stages if isinstance(each, BuildData)}
    data = own.get(reference)  # data of another run names stages of that run's recipe
    while data is not None and isinstance(data.tokenizer, str):
        data = own.get(data.tokenizer)
    size = data.tokenizer.vocabulary_size if data is not None and not isinstance(data.tokenizer, str) else 0
    if size <= shape.vocabulary_size:
        return
    raise TokenizerMismatch(
        f"stages.{stage}: the tokenizer of the data {reference!r} has {size:,} ids, but the {who} has "
        f"{shape.vocabulary_size:,} embedding rows",
        f"an id of {shape.vocabulary_size:,} or more would be looked up outside the embedding",
        f"give the tokenizer of the build_data stage and the {who} the same vocabulary_size",
    )


def check_rows(recipe: Recipe, stage: Distil, student: ModelShape, teacher: ModelShape) -> str | None:
    """A note on how the stage treats vocabularies with different numbers of rows; None if they are the same.

    Raises:
        VocabularyMismatch: the additional rows are known to belong to tokens: random weights and extended vocabularies
            have no padding.
    """
    sizes = {"student": student.vocabulary_size, "teacher": teacher.vocabulary_size}
    longer = max(sizes, key=lambda who: sizes[who])
    fewest, most = min(sizes.values()), sizes[longer]
    if fewest == most:
        return None
    model = stage.model if longer == "student" else stage.teacher
    made, root = ([], None) if model.source is None else lineage(recipe, model.source)
    ids: int | None = most
    if root is not None and not any(isinstance(ancestor.stage, ExpandVocabulary) for ancestor in made):
        first = getattr(made[0].stage, "model", None) if made else model
        config = cached_config(root, first.revision if isinstance(first, ModelInput) else None)
        pieces = _pieces(config.parent if config else Path(root).expanduser())
        ids = 1 + max(pieces) if pieces else None  # if unknown, the stage itself will load the tokenizer and check
    if ids is not None and ids > fewest:
        raise VocabularyMismatch(
            f"stages.{stage.name}: a student with vocabulary {sizes['student']:,} and a teacher with "
            f"{sizes['teacher']:,}; the {longer}'s has {ids:,} tokens",
            "the loss compares the two models' probabilities of the same tokens",
            VocabularyMismatch.DO,
        )
    note = f"the {longer}'s last {most - fewest:,} vocabulary rows will be ignored, which is right only for padding"
    if most - fewest <= _MOST_PADDING:
        return note
    return f"{note}; {most - fewest:,} is unusually many for padding, so check that the tokenizers match"


def with_shared_rows(student: ModelShape, teacher: ModelShape) -> tuple[ModelShape, ModelShape]:
    """Both shapes with the smaller number of vocabulary rows, as `distil` uses them."""
    same = {"vocabulary_size": min(student.vocabulary_size, teacher.vocabulary_size)}
    return student.model_copy(update=same), teacher.model_copy(update=same)


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
            f"stages.{stage}: {ours.stage!r} trains a tokenizer of {ours.trained:,} ids for its data, but "
            f"{theirs.outside} has its own, of {1 + max(known):,}",
            "the model would misread the text",
            f"give the build_data stage `tokenizer: {theirs.outside}`, and add missing pieces in an expand_vocabulary "
            "stage",
        )
    for number, piece in sorted(pieces.items()):
        if known.get(number, piece) != piece:
            raise TokenizerMismatch(
                f"stages.{stage}: id {number} is {piece!r} in the data's tokenizer {ours.outside or folder}, but "
                f"{known[number]!r} in that of {theirs.outside}",
                "the model would misread the text",
                f"give the build_data stage the model's own tokenizer (`tokenizer: {theirs.outside}`)",
            )


def _origin(recipe: Recipe, reference: str, model: ModelInput | str = "") -> _Origin:
    """Trace a model or data back to the origin of its tokenizer."""
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
            source = source.source or getattr(stage, "data", None)  # random weights use their data's tokenizer
        if not isinstance(source, str):
            return _Origin(stage.name, getattr(source, "vocabulary_size", 0))
        reference = source


def _folder(origin: _Origin) -> Path | None:
    """The folder on this machine of a tokenizer from outside the recipe; None if it is not here."""
    path = Path(origin.outside).expanduser()
    config = None if path.is_dir() else cached_config(origin.outside, origin.revision)
    places = [config.parent] if config else [path, path / "tokenizer", path / "model"]
    return next((place for place in places if any((place / name).is_file() for name in VOCABULARY_FILES)), None)


def _pieces(folder: Path) -> dict[int, str]:
    """The piece of each id in a tokenizer.json; empty if the file is missing or has another format."""
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

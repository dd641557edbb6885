"""Growing a tokenizer's vocabulary by the pieces of another, and measuring its effect on tokens per character."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minima.data.documents import HeldOut, Rejected, batched
from minima.data.encoding import Encoder, EncodingTask
from minima.data.mixture import read_shuffled, source_labels, training_texts
from minima.data.vocabularies.byte_level import ByteLevelDonor, ByteLevelVocabulary
from minima.data.vocabularies.selection import Selection, select
from minima.data.vocabularies.sentencepiece import SentencePieceDonor, SentencePieceVocabulary
from minima.errors import DataError, ShapeError, TokenizerMismatch
from minima.recipe.data import Source
from minima.recipe.vocabulary import DonorTraining, ExpandVocabulary

logger = logging.getLogger("minima.data")


Base = SentencePieceVocabulary | ByteLevelVocabulary  # the tokenizer to grow
Donor = SentencePieceDonor | ByteLevelDonor  # the one that pieces are taken from


@dataclass(frozen=True)
class Expansion:
    """A grown tokenizer."""

    size: int  # number of rows that the model gets
    first: int  # id of the first new piece
    origins: list[list[int]]  # for each new piece, in the order of ids, the old ids of its text
    metrics: dict[str, Any]  # the numbers that the stage reports


def open_base(folder: Path) -> Base:
    """Open the tokenizer in a folder: SentencePiece if it holds a `tokenizer.model`, else byte-level BPE.

    Raises:
        DataError: there is none, or it is of an unsupported kind.
    """
    return (SentencePieceVocabulary if (folder / "tokenizer.model").is_file() else ByteLevelVocabulary)(folder)


def expand(stage: ExpandVocabulary, base: Base, donor: Path | DonorTraining, rows: int, folder: Path) -> Expansion:
    """Choose the donor's pieces and write the grown tokenizer.

    Old pieces are merged before new ones. So text in which no new piece occurs keeps its ids: with a `script`, that is
    all text without a character of it. Without one, adjacent old tokens of any text may become one new token.

    Rows beyond the last piece belong to no token and are in no file of the tokenizer. So they cannot be written or read
    by mistake, and tokens that are added later (`add_tokens`, for roles) use these rows.

    Args:
        donor: a tokenizer's file or a folder that holds one, or how to train one.
        rows: number of rows of the model's embedding; those that no old id uses are given to new pieces.

    Raises:
        DataError: a tokenizer cannot be read, no piece passes the filters, or a source holds no text.
        TokenizerMismatch: the donor is of another kind.
        ShapeError: the size leaves no room for new pieces.
    """
    _check_room(stage, base, rows)
    texts = _Texts(stage)
    held_out = texts.held_out()
    before = _tokens_per_character(base.folder, base.size, held_out)
    if isinstance(donor, DonorTraining):
        logger.info("training a donor of %d pieces", donor.vocabulary_size)
        found = base.train_donor(texts.for_donor(donor), donor.vocabulary_size)
    else:
        found = _read(base, donor)
    counts = found.count(texts.to_count()) if stage.count_on else None
    minimum = stage.minimum_count if stage.minimum_count is not None else int(stage.size is None)

    def up(size: int) -> int:
        return -(-size // stage.multiple) * stage.multiple

    def room(passing: int) -> int:
        return min(stage.size or up(base.size + passing), up(base.size + passing)) - base.size

    chosen = select(found.pieces, base, script=stage.script, counts=counts, minimum_count=minimum, room=room)
    added = chosen.added
    size = stage.size or up(max(base.size + len(added), rows))
    _check_found(chosen, size - base.size)
    base.write(folder, added)
    after = _tokens_per_character(folder, size, held_out)
    metrics = {
        "vocabulary_before": rows,
        "vocabulary": size,
        "pieces_before": base.size,
        "pieces": base.size + len(added),
        "pieces_added": len(added),
        "reserved": size - base.size - len(added),
        "kind": base.kind,
        "donor_pieces": len(found.pieces),
        "left_out": chosen.left_out,
        "tokens_per_character": {label: {"before": before[label], "after": after[label]} for label in before},
        "rejected": {use: dict(rejected.counts) for use, rejected in texts.rejected.items() if rejected.counts},
    }
    return Expansion(size, base.size, base.split(added), metrics)


class _Texts:
    """The texts of a stage's sources; the same rule for held-out texts applies to all of them.

    Attributes:
        rejected: records that gave no text, by the purpose they were read for.
    """

    def __init__(self, stage: ExpandVocabulary) -> None:
        self._stage, self._aside = stage, HeldOut(stage.held_out_fraction, stage.seed)
        self.rejected = {use: Rejected() for use in ("donor", "count_on", "report_on")}

    def for_donor(self, donor: DonorTraining) -> Iterator[str]:
        """The texts to train a donor on."""
        sources = list(enumerate(donor.sources))
        return training_texts(sources, self._aside, donor.max_characters, self.rejected["donor"])

    def to_count(self) -> Iterator[str]:
        """Texts of `count_on` that are not held out."""
        for number, source in enumerate(self._stage.count_on):
            yield from self._read(source, number, "count_on", held_out=False)

    def held_out(self) -> dict[str, list[str]]:
        """Held-out texts of `report_on`, by label."""
        sources = self._stage.report_on
        texts = {
            label: list(self._read(sources[number], number, "report_on", held_out=True))
            for number, label in enumerate(source_labels(sources))
        }
        for label, found in texts.items():
            if not found:
                raise DataError(
                    f"no document of source {label!r} is held out",
                    "tokens per character are reported on held-out text",
                    "raise `held_out_fraction`, give the source more documents, or remove it from `report_on`",
                )
        return texts

    def _read(self, source: Source, number: int, use: str, *, held_out: bool) -> Iterator[str]:
        for batch in batched(read_shuffled(source, number, self._stage.seed, self.rejected[use])):
            aside = self._aside.mask([text.encode("utf-8") for text in batch])
            yield from (text for text, is_aside in zip(batch, aside, strict=True) if is_aside == held_out)


def _tokens_per_character(folder: Path, size: int, texts: Mapping[str, list[str]]) -> dict[str, float]:
    encoder = Encoder(folder, 0, size)
    lengths = {}
    for label, documents in texts.items():
        encoded = encoder(EncodingTask(documents, HeldOut(0.0, 0)))[0]
        lengths[label] = (len(encoded.ids) - len(documents)) / int(encoded.characters.sum())  # without end tokens
    return lengths


def _read(base: Base, path: Path) -> Donor:
    """Read the donor from a file, or from a folder's `tokenizer.model` or tokenizer.json."""
    wants_json = isinstance(base, ByteLevelVocabulary)
    if path.is_dir():
        names = sorted(("tokenizer.model", "tokenizer.json"), key=lambda name: name.endswith("json") != wants_json)
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise DataError(
                f"the donor's folder {path} holds neither tokenizer.model nor tokenizer.json",
                "there are no pieces to take from it",
                "give a tokenizer's file, or another folder",
            )
        path = found[0]
    with path.open("rb") as file:
        is_json = file.read(1024).lstrip()[:1] == b"{"
    if is_json != wants_json:
        raise TokenizerMismatch(
            f"donor {path} is {'a' if is_json else 'not a'} JSON file, but the base is a {base.kind}",
            "a SentencePiece BPE is read from its tokenizer.model, a byte-level BPE from its tokenizer.json; the two "
            "kinds represent text differently",
            "give a donor of the base's kind, or train one (`donor: {vocabulary_size: N, sources: [...]}`)",
        )
    return base.read_donor(path)


def _check_room(stage: ExpandVocabulary, base: Base, rows: int) -> None:
    if stage.size is not None and (stage.size < rows or stage.size <= base.size):
        raise ShapeError(
            f"size {stage.size} for a model of {rows} rows and a tokenizer of {base.size} pieces",
            "a vocabulary can only grow here, because every old token keeps its row",
            f"choose a size above {max(rows, base.size)} that is a multiple of {stage.multiple}, or omit it",
        )


def _check_found(chosen: Selection, room: int) -> None:
    if not chosen.added:
        reasons = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in chosen.left_out.items() if count)
        raise DataError(
            f"no piece of the donor is added ({reasons or 'it has none'})",
            "the model would only get rows that belong to no token",
            "choose another donor, `script` or `minimum_count`",
        )
    if (missing := room - len(chosen.added)) > 0:
        logger.warning("%d rows have no piece: no more of the donor's pieces pass the filters", missing)

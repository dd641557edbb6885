"""SentencePiece BPE vocabularies: reading, counting, training, and growing tokenizer.model and tokenizer.json alike."""

import copy
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers.models import BPE

from minima.data.documents import batched
from minima.data.piece_training import train_sentencepiece
from minima.data.tokenizer import SPACE, load_tokenizer, pairs_of, save_tokenizer
from minima.data.vocabularies.selection import has_script
from minima.errors import DataError

_PROTO: Any = sentencepiece_model_pb2  # its classes are created on import, so type checkers do not know them
_KIND = _PROTO.ModelProto.SentencePiece


def read_model(path: Path) -> Any:
    """Read a SentencePiece BPE from a file, as a `ModelProto`.

    Raises:
        DataError: it is not a SentencePiece BPE, has no text pieces, or a piece is empty, a duplicate or has no finite
            score.
    """
    model = _PROTO.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise DataError(
            f"{path} is not a SentencePiece model: {error}",
            "its pieces cannot be read",
            "give a tokenizer.model written by SentencePiece, or the tokenizer.json of a byte-level BPE",
        ) from error
    if not model.pieces or model.trainer_spec.model_type != _PROTO.TrainerSpec.BPE:
        kind = _PROTO.TrainerSpec.ModelType.Name(model.trainer_spec.model_type).lower() if model.pieces else "empty"
        raise DataError(
            f"{path} is a SentencePiece model of type {kind}",
            "pieces are added as merges, which only BPE has",
            "give a SentencePiece BPE, or train a donor on text in its language (`donor: {vocabulary_size: N, ...}`)",
        )
    seen: dict[str, int] = {}
    for number, piece in enumerate(model.pieces):
        if not piece.piece or piece.piece in seen:
            wrong = f"repeats piece {seen[piece.piece]}, {piece.piece!r}" if piece.piece else "is empty"
            raise DataError(
                f"piece {number} of {path} {wrong}",
                "each id must belong to exactly one piece, and a piece must not be empty",
                "repair the model, or use another",
            )
        if not math.isfinite(piece.score):
            raise DataError(
                f"piece {number} of {path}, {piece.piece!r}, has a score of {piece.score}",
                "scores determine the order of merging, and this one has no place in it",
                "repair the model, or use another",
            )
        seen[piece.piece] = number
    if all(piece.type != _KIND.NORMAL for piece in model.pieces):
        raise DataError(
            f"{path} has no text pieces, only {len(model.pieces)} control and byte pieces",
            "there is nothing to merge",
            "give a tokenizer.model that was trained on text",
        )
    return model


class SentencePieceDonor:
    """Pieces to choose from.

    Attributes:
        pieces: pieces that merging can make, in merge order. Without those that contain a space after their first
            character, where the fast versions of many tokenizers split text.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        normal = [piece for piece in model.pieces if piece.type == _KIND.NORMAL]
        normal.sort(key=lambda piece: -piece.score)
        self.pieces = [piece.piece for piece in normal if SPACE not in piece.piece[1:]]

    def count(self, texts: Iterable[str]) -> Counter[str]:
        """How often the donor gives each piece when it reads the texts."""
        processor = SentencePieceProcessor(model_proto=self._model.SerializeToString())
        counts = np.zeros(len(self._model.pieces), dtype=np.int64)
        for batch in batched(texts):
            ids = chain.from_iterable(processor.encode(batch, num_threads=1))
            counts += np.bincount(np.fromiter(ids, dtype=np.int64), minlength=len(counts))
        return Counter({self._model.pieces[i].piece: int(counts[i]) for i in np.flatnonzero(counts)})


class SentencePieceVocabulary:
    """The base: a `tokenizer.model`, with or without the tokenizer.json that transformers reads.

    Tokens that transformers adds to the model's own (`<pad>`, roles) become pieces of the grown model: control pieces
    if they are special, else user-defined pieces, which are matched as a whole. So both files keep the same ids.

    Raises:
        DataError: it is not a SentencePiece BPE, transformers does not load it as a BPE, or the two have different ids.
    """

    kind = "SentencePiece BPE"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._model = read_model(folder / "tokenizer.model")
        self._fast = load_tokenizer(folder)
        self._fill_up()
        self.known: Mapping[str, int] = {piece.piece: i for i, piece in enumerate(self._model.pieces)}
        self.size = len(self.known)
        self._scores = {piece.piece: piece.score for piece in self._model.pieces if piece.type == _KIND.NORMAL}
        self._lowest = min(self._scores.values())
        self._probe = _as_it_stands(self._model)

    def _fill_up(self) -> None:
        """Add the tokens that only transformers knows to the model, and refuse differing ids."""
        if not isinstance(getattr(getattr(self._fast, "backend_tokenizer", None), "model", None), BPE):
            raise DataError(
                f"transformers loads {self.folder} as {type(self._fast).__name__}, which has no list of merges",
                "pieces must be added both to its merges and to the tokenizer.model",
                "remove the tokenizer.json and tokenizer_config.json beside the tokenizer.model",
            )
        ids = {index: piece for piece, index in self._fast.get_vocab().items()}
        own = [piece.piece for piece in self._model.pieces]
        for index in range(len(own), max(ids) + 1):
            if index in ids:
                told = self._fast.added_tokens_decoder.get(index)
                kind = _KIND.USER_DEFINED if told is not None and not told.special else _KIND.CONTROL
                self._model.pieces.add(piece=ids[index], score=0.0, type=kind)
        for index, piece in enumerate(self._model.pieces):
            if ids.get(index) != piece.piece:
                raise DataError(
                    f"id {index} is {piece.piece!r} in {self.folder}/tokenizer.model, but {ids.get(index)!r} in what "
                    "transformers loads from that folder",
                    "pieces added to both would get different ids in each",
                    "download the tokenizer again, or remove the file that does not belong to the model",
                )

    def order(self, left: str, right: str, added: Mapping[str, int]) -> float | None:
        piece = left + right
        if piece in self._scores:
            return -self._scores[piece]
        return 1 - self._lowest + added[piece] if piece in added else None

    def in_script(self, piece: str, script: str) -> bool:
        return any(has_script(script, ord(character)) for character in piece)

    def writable(self, piece: str) -> bool:
        return self._probe.normalize(piece) == piece  # normalisation may replace a full-width letter, for example

    def stands_alone(self, piece: str) -> bool:
        return True

    def split(self, pieces: Iterable[str]) -> list[list[int]]:
        """The base's own ids for each piece's text inside a line, that is, without a space put before it."""
        return self._probe.encode(list(pieces), num_threads=1)

    def read_donor(self, path: Path) -> SentencePieceDonor:
        """Read a donor from a file."""
        return SentencePieceDonor(read_model(path))

    def train_donor(self, texts: Iterable[str], vocabulary_size: int) -> SentencePieceDonor:
        """Train a donor on texts.

        Single characters get at most half of its pieces: Chinese text has thousands of rare ones, which would leave a
        small donor no room for anything else. Lines are split at the rarer characters, which the base continues to
        encode as bytes. No space is put before a line (as would be before a text), because no text has one there.
        """
        kept = list(texts)
        characters: Counter[str] = Counter()
        for text in kept:
            characters.update(text)
        rare = characters.most_common()[(vocabulary_size - 259) // 2 :]  # 256 bytes and three control pieces come first
        breaks = {ord(character): "\n" for character, _ in rare}
        model = train_sentencepiece((text.translate(breaks) for text in kept), vocabulary_size, space_before=False)
        return SentencePieceDonor(_PROTO.ModelProto.FromString(model))

    def write(self, folder: Path, added: Sequence[str]) -> None:
        """Write the grown tokenizer: all of the base's files, with the new pieces in both.

        Scores decrease from the base's lowest in steps that float32 can resolve, so that no two are equal (the two
        libraries break ties differently) and no old merge comes after a new one.
        """
        save_tokenizer(self._fast, self.folder, folder)
        grown = copy.deepcopy(self._model)
        step = max(1.0, 2.0 * float(np.spacing(np.float32(abs(self._lowest)))))
        for number, piece in enumerate(added, 1):
            grown.pieces.add(piece=piece, score=self._lowest - number * step, type=_KIND.NORMAL)
        grown.trainer_spec.vocab_size = len(grown.pieces)
        (folder / "tokenizer.model").write_bytes(grown.SerializeToString())
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = {piece.piece: i for i, piece in enumerate(grown.pieces)}
        model = content["model"]
        merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
        model["merges"] = self._with_merges(merges, added, vocabulary)
        # Tokens that are only in `added_tokens` would be moved after the new pieces when the file is read.
        model["vocab"] = vocabulary
        path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")

    def _with_merges(
        self, merges: list[tuple[str, ...]], added: Sequence[str], vocabulary: Mapping[str, int]
    ) -> list[tuple[str, ...]]:
        """The base's merges, then all pairs that make an added piece.

        SentencePiece merges any two pieces that make a third. So an old piece that contains an added one gets further
        merges, which are inserted next to its own.
        """
        new = set(added)
        places: dict[int, list[tuple[str, ...]]] = {}
        own: dict[str, int] = {}
        for piece, score in self._scores.items():
            pairs = [pair for pair in pairs_of(piece, vocabulary) if new.intersection(pair)]
            if pairs:
                own = own or {left + right: at for at, (left, right) in enumerate(merges)}
                later = (at for at, merge in enumerate(merges) if self._scores.get("".join(merge), score) < score)
                at = own[piece] + 1 if piece in own else next(later, len(merges))
                places.setdefault(at, []).extend(pairs)
        grown: list[tuple[str, ...]] = []
        for at, merge in enumerate(merges):
            grown += [*places.get(at, []), merge]
        grown += places.get(len(merges), [])
        return grown + [pair for piece in added for pair in pairs_of(piece, vocabulary)]


def _as_it_stands(model: Any) -> Any:
    """A processor that neither puts a space before a text nor removes any."""
    bare = copy.deepcopy(model)
    bare.normalizer_spec.add_dummy_prefix = bare.normalizer_spec.remove_extra_whitespaces = False
    return SentencePieceProcessor(model_proto=bare.SerializeToString())

"""Byte-level BPE vocabularies (as in GPT-2, Qwen, SmolLM2, Llama 3): reading, counting, training, growing."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from minima.data.documents import batched
from minima.data.tokenizer import load_tokenizer, save_tokenizer
from minima.data.vocabularies.selection import has_script
from minima.errors import DataError

_SPACE = "\u0120"  # the letter that stands for the byte of a space
Pair = tuple[str, str]


def _bytes_by_letter() -> dict[str, int]:
    """GPT-2's mapping of letters to bytes: printable Latin-1 stands for itself, the other bytes follow from U+0100."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _bytes_by_letter()


def read_content(text: str, name: str) -> dict[str, Any]:
    """The `model` part of a byte-level BPE's tokenizer.json.

    Raises:
        DataError: it is another kind of tokenizer or damaged, or a piece is empty or shares its id with another.
    """
    try:
        content = json.loads(text, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise _unreadable(name, str(error)) from error
    if not isinstance(content, dict) or not isinstance(content.get("model") or {}, dict):
        raise _unreadable(name, "it does not have the layout of a tokenizer.json")
    model, around = content.get("model") or {}, json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
    kind = model.get("type") or ("BPE" if {"vocab", "merges"} <= model.keys() else None)  # GPT-2's own file has none
    suffixed = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if kind != "BPE" or '"ByteLevel"' not in around or suffixed:
        raise DataError(
            f"{name} is neither a SentencePiece BPE with its tokenizer.model nor a byte-level BPE, but "
            f"{kind or 'something else'}" + (" over characters" if kind == "BPE" else ""),
            "pieces are added as merges, which other kinds do not have or represent differently",
            "use one of those two kinds; a SentencePiece tokenizer needs its tokenizer.model beside the json",
        )
    _check_layout(model, name)
    ids: dict[int, str] = {}
    for piece, index in model["vocab"].items():
        if not piece or index in ids:
            wrong = f"shares id {index} with {ids[index]!r}" if piece else "is empty"
            raise DataError(
                f"piece {piece!r} of {name} {wrong}",
                "each id must belong to exactly one piece, and a piece must not be empty",
                "repair the tokenizer, or use another",
            )
        ids[index] = piece
    model["merges"] = [_pair(merge) for merge in model["merges"]]
    return model


def _check_layout(model: dict[str, Any], name: str) -> None:
    """Refuse a BPE without pieces and their ids, or without merges of two pieces each."""
    pieces, merges = model.get("vocab"), model.get("merges")
    if not isinstance(pieces, dict) or not all(isinstance(index, int) for index in pieces.values()):
        raise _unreadable(name, "its `vocab` does not map every piece to an id")
    if not isinstance(merges, list):
        raise _unreadable(name, "its `merges` are not a list")
    for merge in merges:
        pair = _pair(merge) if isinstance(merge, str | list) else ()
        if len(pair) != 2 or not all(isinstance(piece, str) for piece in pair):
            raise _unreadable(name, f"the merge {merge!r} does not consist of two pieces")


def _pair(merge: str | list[str]) -> tuple[str, ...]:
    """The two pieces of a merge, which older files write as one string."""
    return tuple(merge.split(" ") if isinstance(merge, str) else merge)


def _unreadable(name: str, error: str) -> DataError:
    return DataError(
        f"{name} cannot be read: {error}",
        "so its pieces are not known",
        "download it again, or give another tokenizer.json of a byte-level BPE",
    )


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; refuses duplicate names, of which the last would silently win."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {next(name for name in found if names.count(name) > 1)!r} twice")
    return found


class ByteLevelDonor:
    """Pieces to choose from.

    Attributes:
        pieces: the results of its merges, in merge order.
    """

    def __init__(self, tokenizer: Tokenizer, merges: Sequence[Pair]) -> None:
        self.pieces = list(dict.fromkeys(left + right for left, right in merges))
        self._tokenizer = tokenizer

    def count(self, texts: Iterable[str]) -> Counter[str]:
        """How often the donor gives each piece when it reads the texts."""
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        counts: Counter[int] = Counter()
        for batch in batched(texts):
            for encoding in self._tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                counts.update(encoding.ids)
        names = {index: piece for piece, index in self._tokenizer.get_vocab().items()}
        return Counter({names[index]: count for index, count in counts.items()})


class ByteLevelVocabulary:
    """The base: a byte-level BPE that transformers loads.

    Raises:
        DataError: it is of another kind, or a piece is empty or shares its name or its id with another.
    """

    kind = "byte-level BPE"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        file = folder / "tokenizer.json"
        if file.is_file():  # check the file itself: of two pieces with the same id or name, loading keeps the last
            read_content(file.read_text(encoding="utf-8", errors="replace"), str(file))
        self._fast = load_tokenizer(folder)
        backend = getattr(self._fast, "backend_tokenizer", None)
        if backend is None:
            raise DataError(
                f"the tokenizer in {folder} has no fast version",
                "its merges cannot be read or extended",
                "give a tokenizer with a tokenizer.json, or a SentencePiece BPE with its tokenizer.model",
            )
        self._tokenizer: Tokenizer = backend
        model = read_content(backend.to_str(), str(folder))
        self._merges: list[Pair] = model["merges"]
        self._ranks = {pair: rank for rank, pair in enumerate(self._merges)}
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.known: Mapping[str, int] = vocabulary
        self.size = max(vocabulary.values()) + 1
        self._model = models.BPE(vocab=model["vocab"], merges=self._merges)

    def order(self, left: str, right: str, added: Mapping[str, int]) -> float | None:
        if (left, right) in self._ranks:
            return self._ranks[left, right]
        piece = left + right
        if piece not in added:
            return None
        return len(self._ranks) + added[piece] + len(left) / len(piece)  # the order in which `write` lists the pairs

    def in_script(self, piece: str, script: str) -> bool:
        content = _content(piece)
        if any(has_script(script, ord(character)) for character in content.decode("utf-8", errors="ignore")):
            return True
        return _all_of_script(_unfinished(content), script)

    def writable(self, piece: str) -> bool:
        if not set(piece) <= _BYTES.keys():
            return False
        text = _text(piece)
        if text is None:  # part of a character's bytes: never split, because characters are not
            return True
        if self._tokenizer.normalizer is not None and self._tokenizer.normalizer.normalize_str(text) != text:
            return False
        parts = [part for part, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        return parts in ([piece], [_SPACE + piece])  # some pre-tokenizers put a space before a text

    def stands_alone(self, piece: str) -> bool:
        return _text(piece) is not None

    def split(self, pieces: Iterable[str]) -> list[list[int]]:
        """The base's own ids for each piece's text inside a line."""
        return [[token.id for token in self._model.tokenize(piece)] for piece in pieces]

    def read_donor(self, path: Path) -> ByteLevelDonor:
        """Read a donor from a tokenizer.json."""
        text = path.read_text(encoding="utf-8", errors="replace")
        merges = read_content(text, str(path))["merges"]
        try:
            return ByteLevelDonor(Tokenizer.from_str(text), merges)
        except Exception as error:  # tokenizers raises this class itself
            raise _unreadable(str(path), str(error)) from error

    def train_donor(self, texts: Iterable[str], vocabulary_size: int) -> ByteLevelDonor:
        """Train a donor on texts, with the base's normalizer and pre-tokenizer."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer, tokenizer.pre_tokenizer = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        tokenizer.decoder = self._tokenizer.decoder
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocabulary_size, initial_alphabet=letters, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        if tokenizer.get_vocab_size() < vocabulary_size:
            raise DataError(
                f"the text gives {tokenizer.get_vocab_size()} pieces, not {vocabulary_size}",
                "a short text has too few different words",
                "give the donor more text, or a smaller `vocabulary_size`",
            )
        return ByteLevelDonor(tokenizer, read_content(tokenizer.to_str(), "the trained donor")["merges"])

    def write(self, folder: Path, added: Sequence[str]) -> None:
        """Write the grown tokenizer: all of the base's files, with the new pieces and merges after the old ones.

        Every pair that makes a new piece becomes a merge, because the base may arrive at the piece by joining its
        characters in a different way than the donor.
        """
        save_tokenizer(self._fast, self.folder, folder)
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        model = content["model"]
        # Tokens that are only in `added_tokens` would be moved after the new pieces when the file is read.
        vocabulary = {**self.known, **{piece: index for index, piece in enumerate(added, self.size)}}
        pairs = (
            (piece[:cut], piece[cut:])
            for piece in added
            for cut in range(1, len(piece))
            if piece[:cut] in vocabulary and piece[cut:] in vocabulary
        )
        model |= {"vocab": vocabulary, "merges": [*self._merges, *pairs]}
        path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def _content(piece: str) -> bytes:
    return bytes(_BYTES[letter] for letter in piece)


def _text(piece: str) -> str | None:
    """A piece's text; None if it begins or ends inside a character."""
    try:
        return _content(piece).decode("utf-8")
    except UnicodeDecodeError:
        return None


def _unfinished(content: bytes) -> bytes:
    """The bytes of an incomplete character at the end."""
    for begin in range(len(content) - 1, max(-1, len(content) - 4), -1):
        byte = content[begin]
        if byte & 0xC0 == 0x80:
            continue
        length = 1 + (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0)
        return content[begin:] if begin + length > len(content) else b""
    return b""


def _all_of_script(beginning: bytes, script: str) -> bool:
    """Whether every character that begins with these bytes belongs to a script."""
    if not beginning:
        return False
    missing = 1 + (beginning[0] >= 0xE0) + (beginning[0] >= 0xF0) - (len(beginning) - 1)
    value = beginning[0] & (0x1F if beginning[0] < 0xE0 else 0x0F if beginning[0] < 0xF0 else 0x07)
    for byte in beginning[1:]:
        value = value << 6 | byte & 0x3F
    return has_script(script, value << 6 * missing, (value + 1 << 6 * missing) - 1)

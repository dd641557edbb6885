"""Tokenizers: writing a SentencePiece BPE for transformers, loading any, and checks against data and models."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minima.errors import DataError, TokenizerMismatch, first_line
from minima.models.layout import VOCABULARY_FILES
from minima.models.legacy_config import LOADING_KEYS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("minima.data")
SPACE = "\u2581"  # SentencePiece's visible space
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes that do exactly what tokenizer.json says
# Spaces, line breaks, digits, contractions, capitals, code, a combining accent, other scripts.
_PROBE = (
    "  Two  words, 12345 that's I'LL;\n\n\tx_1 = 3.5e2\re\u0301t\u00e9 \u7b2c\u4e00 \u0645 \u00bd \U0001f44d\u200b."
)
# The Llama layout: unknown, begin, end, then the 256 bytes, then the learned pieces.
UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"


def write_tokenizer(model: bytes, folder: Path) -> None:
    """Write a SentencePiece BPE so that `AutoTokenizer.from_pretrained(folder)` gives the same ids.

    `tokenizer.json` is the fast equivalent, `tokenizer.model` the model itself. No begin token is added, because
    documents only have an end token, so a trained model has never seen a begin token.

    Args:
        model: content of a `tokenizer.model` whose pieces contain a space only at the start.
        folder: is created if needed.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    learnt = [piece for piece, i in vocabulary.items() if not (pieces.is_control(i) or pieces.is_byte(i) or i == 0)]
    assert not any(SPACE in piece[1:] for piece in learnt), "pieces of several spaces: see piece_training"
    fast = Tokenizer(BPE(vocab=vocabulary, merges=_merges(pieces, learnt), unk_token=UNKNOWN, fuse_unk=True,
                         byte_fallback=True))  # fmt: skip
    fast.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    # No piece crosses a space, so splitting there changes no id but lets words be cached: about 5 times as fast.
    fast.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    fast.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens([AddedToken(token, special=True) for token in (UNKNOWN, BEGIN, END)])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(fast.to_str(pretty=True), encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(model)
    special: dict[str, Any] = {"bos_token": BEGIN, "eos_token": END, "unk_token": UNKNOWN}
    settings = special | {
        # the generic class uses tokenizer.json as it is; the Llama class rebuilds it with its own pre-tokenizer
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "model_input_names": ["input_ids", "attention_mask"],  # by default 4.x adds token types, which Llama refuses
        "model_max_length": 1 << 30,
    }
    for name, content in (("tokenizer_config.json", settings), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")


def _merges(pieces: Any, learnt: list[str]) -> list[tuple[str, str]]:
    """Pairs whose concatenation is a piece, best score first: the order in which SentencePiece merges."""
    known = {piece: i for i, piece in enumerate(learnt)}
    by_score = sorted(learnt, key=lambda piece: -pieces.get_score(pieces.piece_to_id(piece)))
    return [pair for piece in by_score for pair in pairs_of(piece, known)]


def pairs_of(piece: str, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """The pairs of pieces that make a piece, in the order in which transformers' converter lists them."""
    cuts = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
    pairs = [pair for pair in cuts if pair[0] in vocabulary and pair[1] in vocabulary]
    return sorted(pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))


def load_tokenizer(source: str | Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer in a folder or on the Hub.

    Raises:
        DataError: there is none, or it has no end token to close documents with.
    """
    tokenizer = _load(source)
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer of {str(source)!r} has no end token",
            "every document is closed by it; without it, documents would run into each other",
            "name one as `eos_token` in its tokenizer_config.json",
        )
    return tokenizer


def is_lone(source: str | Path) -> bool:
    """Whether a folder's tokenizer is a SentencePiece model without a file that says how to use it."""
    others = ("tokenizer.json", "tokenizer_config.json", "config.json")
    return (Path(source) / "tokenizer.model").is_file() and not any((Path(source) / name).is_file() for name in others)


def _load(source: str | Path) -> "PreTrainedTokenizerBase":
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    try:
        # From a lone tokenizer.model, AutoTokenizer makes a tokenizer that puts no space before the text: wrong ids,
        # but no error.
        tokenizer = LlamaTokenizer.from_pretrained(str(source)) if is_lone(source) else _load_auto(source)
        if _overruled(source, tokenizer):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(source))
    except Exception as error:  # for a damaged file tokenizers raises this very class, and transformers any other
        raise DataError(
            f"no tokenizer can be loaded from {str(source)!r}: {first_line(error)}",
            "text cannot be turned into tokens without it",
            "give a folder with an intact tokenizer.json or tokenizer.model, a Hub id that this machine can reach, or "
            "`tokenizer: {vocabulary_size: N}` to train one",
        ) from error
    return tokenizer


def _load_auto(source: str | Path) -> "PreTrainedTokenizerBase":
    """What AutoTokenizer loads, without executing code from the folder.

    Unless told not to, it asks on standard input whether to run that code, and take a message to `minima chat` that
    happens to be `y` or `1` for a yes.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)


def misread_as(folder: Path) -> str | None:
    """The class that `AutoTokenizer` uses for a model's folder in place of the declared one; None if it does not.

    For some families (qwen2) transformers 5 uses the family's own class, which splits text in its own way, whatever
    tokenizer the folder declares. Other programs that load the folder would get different ids, or none for a space.
    """
    try:
        tokenizer = _load_auto(folder)
        if not _overruled(folder, tokenizer) or tokenizer(_PROBE)["input_ids"] == _load(folder)(_PROBE)["input_ids"]:
            return None
    except Exception:  # any class, as in `_load`; a tokenizer that does not load is refused where it is needed
        return None
    return type(tokenizer).__name__


def _overruled(source: str | Path, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a folder declares a class that follows its tokenizer.json, but was loaded with another one."""
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    declared = get_tokenizer_config(str(source)).get("tokenizer_class")
    return declared in _PLAIN_CLASSES and type(tokenizer).__name__ not in _PLAIN_CLASSES


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", source: str | Path, folder: Path) -> None:
    """Write a loaded tokenizer into a folder, with its SentencePiece model if its source folder has one.

    The keys in which transformers records how it was loaded (from where, offline or not) are removed, so that the
    folder's content depends only on the tokenizer and is the same on a login node and in a job.
    """
    tokenizer.save_pretrained(str(folder))
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        config = json.loads(settings.read_text(encoding="utf-8"))
        kept = {name: value for name, value in config.items() if name not in LOADING_KEYS}
        settings.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    model = Path(source) / "tokenizer.model"
    if model.is_file():
        shutil.copyfile(model, folder / "tokenizer.model")


def ends_added(tokenizer: "PreTrainedTokenizerBase") -> tuple[bool, bool]:
    """Whether a tokenizer by default puts its begin token before a text, and its end token after it."""
    ids = tokenizer("a")["input_ids"]
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    return begin is not None and ids[:1] == [begin], end is not None and ids[-1:] == [end]


def check_same_tokens(data: Path, own: Path, model: str) -> None:
    """Refuse data whose ids mean something else to the model, which equal vocabulary sizes do not rule out.

    Args:
        data: folder of the tokenizer that the data was made with.
        own: folder of the model's own tokenizer.

    Raises:
        TokenizerMismatch: the tokenizers differ; the message names the first id that does.
    """
    files = [folder / "tokenizer.json" for folder in (data, own)]
    if all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return
    try:
        theirs, ours = (_load(folder).get_vocab() for folder in (data, own))
    except DataError as error:  # a model may have a tokenizer of an unsupported kind, and the data has only ids
        logger.warning("cannot tell whether the data and %s have the same tokens: %s", model, error.what)
        return
    pieces = {index: piece for piece, index in ours.items()}
    for piece, index in sorted(theirs.items(), key=lambda item: item[1]):
        if pieces.get(index) != piece:
            raise TokenizerMismatch(
                f"id {index} is {piece!r} in the data's tokenizer {data} and {pieces.get(index)!r} in that of {model}",
                "the model would read other words than those of the text",
                "build the data with the model's own tokenizer (`tokenizer:` of the build_data stage)",
            )


def count_ids(folder: Path) -> int:
    """One more than the highest id of a model's tokenizer.

    Raises:
        DataError: there is no tokenizer, it cannot be loaded, or it has no tokens.
    """
    vocabulary = _load(folder).get_vocab() if any((folder / name).is_file() for name in VOCABULARY_FILES) else {}
    if not vocabulary:  # from a config.json alone, transformers makes a tokenizer with a token or two
        raise DataError(
            f"{folder} holds no tokenizer ({', '.join(VOCABULARY_FILES)})",
            "without it the number of the model's tokens is not known",
            "give a folder that holds both model and tokenizer",
        )
    return int(max(vocabulary.values())) + 1


def check_vocabulary(tokenizer_size: int, model_size: int, tokenizer: str, model: str) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for. (More rows than ids is just padding.)

    Args:
        tokenizer_size: one more than the tokenizer's highest id; `len(tokenizer)`.
        model_size: rows of the model's embedding.

    Raises:
        TokenizerMismatch: the tokenizer has more ids than the model has rows.
    """
    if tokenizer_size > model_size:
        raise TokenizerMismatch(
            f"tokenizer {tokenizer} has {tokenizer_size} ids, but model {model} has {model_size} embedding rows",
            f"an id of {model_size} or more would be looked up outside the embedding",
            "use the tokenizer that belongs to the model, or expand the model's vocabulary first",
        )

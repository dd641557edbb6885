"""Training of a SentencePiece BPE on texts."""

import io
from collections.abc import Iterable, Iterator

from minima.errors import DataError

# SentencePiece skips lines longer than 4,192 bytes by default, and a speech of 30,000 words may be a single line.
_LINE_CHARACTERS = 1000


def train_sentencepiece(texts: Iterable[str], vocabulary_size: int, *, space_before: bool = True) -> bytes:
    """Train a SentencePiece BPE model in the layout of Llama's.

    It has byte fallback, identity normalisation, separate digits, and a space put before the text. The same texts in
    the same order give the same bytes. Unlike Llama's it has no pieces of several spaces, because there the Rust
    implementation that transformers uses can merge in a different order than SentencePiece.

    Args:
        texts: documents; training is line by line, so no piece contains a line break.
        vocabulary_size: number of pieces, including three control pieces and 256 bytes.
        space_before: whether a space is put before the text; in training, before each line.

    Returns:
        The content of a `tokenizer.model`.

    Raises:
        DataError: the texts give fewer pieces than that, or have more distinct characters than pieces.
    """
    import sentencepiece

    model = io.BytesIO()
    failures: list[BaseException] = []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(_kept_failure(texts, failures)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            add_dummy_prefix=space_before,
            allow_whitespace_only_pieces=False,
            character_coverage=0.99995,  # Llama's value; rarer characters are encoded as bytes
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,  # the order of merges must not depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise DataError(
            f"SentencePiece could not learn {vocabulary_size} pieces: {reason[-300:]}",
            "a short text has too few different words, and a small vocabulary has no room for many characters",
            "give more text, or another `vocabulary_size`",
        ) from error
    return model.getvalue()


def _kept_failure(texts: Iterable[str], failures: list[BaseException]) -> Iterator[str]:
    """The texts; an exception while reading them is recorded, because SentencePiece replaces it with its own."""
    try:
        yield from texts
    except BaseException as failure:
        if not isinstance(failure, GeneratorExit):
            failures.append(failure)
        raise


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """The texts' lines, with long ones split at spaces."""
    for text in texts:
        for line in text.split("\n"):
            begin = 0
            while len(line) - begin > _LINE_CHARACTERS:
                cut = line.rfind(" ", begin + 1, begin + _LINE_CHARACTERS)
                cut = begin + _LINE_CHARACTERS if cut < 0 else cut
                yield line[begin:cut]
                begin = cut + (line[cut] == " ")
            if begin < len(line):
                yield line[begin:]

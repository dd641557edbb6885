"""Very long texts in pieces, because a tokenizer takes about 80 bytes of memory for each byte of a text."""

import re
from collections.abc import Callable, Iterator

# At 80 bytes for each byte of text, a piece takes some 100 MB. A text that is no longer stays whole.
PIECE_CHARACTERS = 1 << 20
_CHECKED_CHARACTERS = 256  # on each side of a cut
_TRIES = 1024  # places to try for one cut: a tokenizer may accept only spaces, and they may be rare
_PLACES = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])|(?<=\S)\n(?=[^\W\d_])")  # between words, or before a line


def pieces(text: str, encode: Callable[[list[str]], list[list[int]]]) -> Iterator[str]:
    """Divide a long text so that its pieces together have the ids of the whole.

    It is cut between two words or before a line, where no usual tokenizer has a token that reaches across. Each cut is
    checked on the text around it. A text without a suitable place stays whole, for example one without spaces for a
    tokenizer that itself puts a space before each text.

    Args:
        text: of any length.
        encode: gives the ids of texts, without begin and end tokens.
    """
    begin = 0
    while len(text) - begin > PIECE_CHARACTERS:
        cut = _cut(text, begin + PIECE_CHARACTERS, encode)
        if cut is None:
            break
        end, following = cut
        yield text[begin:end]
        begin = following
    yield text[begin:]


def _cut(text: str, start: int, encode: Callable[[list[str]], list[list[int]]]) -> tuple[int, int] | None:
    """Where one piece ends and the next begins; None if none of the first places after `start` is suitable.

    The space itself is left out if the tokenizer puts one before each text.
    """
    for _, found in zip(range(_TRIES), _PLACES.finditer(text, start), strict=False):
        at = found.start()
        low, high = max(0, at - _CHECKED_CHARACTERS), at + _CHECKED_CHARACTERS
        for end, following in ((at, at), (at, at + 1)) if text[at] == " " else ((at + 1, at + 1),):
            whole, left, right = encode([text[low:high], text[low:end], text[following:high]])
            if left + right == whole:
                return end, following
    return None

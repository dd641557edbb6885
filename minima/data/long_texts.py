"""Very long texts in pieces, because a tokenizer takes about 80 bytes of memory for each byte of a text."""

import re
from collections.abc import Callable, Iterator

# At 80 bytes for each byte of text, a piece takes some 100 MB. A text that is no longer stays whole.
PIECE_CHARACTERS = 1 << 20
_CHECKED_CHARACTERS = 256  # on each side of a cut
_TRIES = 64  # spaces to try for one cut
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")


def pieces(text: str, encode: Callable[[list[str]], list[list[int]]]) -> Iterator[str]:
    """Divide a long text so that its pieces together have the ids of the whole.

    It is cut at spaces between two words, where no usual tokenizer has a token that reaches across. Each cut is checked
    on the text around it. A text without such a place, for example of Chinese characters alone, stays whole.

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
    """Where one piece ends and the next begins: at a space, or after it if the tokenizer itself puts one before texts.

    None if there is no such place among the first spaces after `start`.
    """
    spaces = _BETWEEN_WORDS.finditer(text, start)
    for _, found in zip(range(_TRIES), spaces, strict=False):
        end = found.start()
        low, high = max(0, end - _CHECKED_CHARACTERS), end + _CHECKED_CHARACTERS
        for following in (end, end + 1):
            whole, left, right = encode([text[low:high], text[low:end], text[following:high]])
            if left + right == whole:
                return end, following
    return None

"""Which pieces of a donor are added: those of a script, the most frequent first, closed under merges.

Added pieces keep the donor's order of merging, after all of the base's; counts decide only which of them are there.
So merging never depends on the cut: what makes a piece of its characters when all candidates are there is the same
sequence of merges when only that sequence's own pieces are, since taking other pieces away takes away only merges that
were not made. That is why a cut that keeps, with each piece, all that it is made of has no dead piece.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

# Marks that no other script is written with: CJK punctuation and the full-width forms of ASCII's.
_EAST_ASIAN = (
    (0x3001, 0x3003), (0x3008, 0x3011), (0x3014, 0x301F),
    (0xFF01, 0xFF0F), (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF65),
)  # fmt: skip
# Unicode's blocks (Blocks.txt): scripts grow within their blocks, and planes 2 and 3 are kept for Han as a whole.
SCRIPTS: dict[str, tuple[tuple[int, int], ...]] = {
    "han": (
        (0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3021, 0x3029), (0x3038, 0x303B), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
        (0xF900, 0xFAFF), (0x20000, 0x3FFFF), *_EAST_ASIAN,
    ),
    "hiragana": ((0x3041, 0x309F), (0x1B001, 0x1B11F), *_EAST_ASIAN),
    "katakana": ((0x30A1, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F), *_EAST_ASIAN),
    "hangul": ((0x1100, 0x11FF), (0x3131, 0x318E), (0xA960, 0xA97F), (0xAC00, 0xD7FF), (0xFFA0, 0xFFDC)),
    "cyrillic": ((0x0400, 0x052F), (0x1C80, 0x1C8F), (0x2DE0, 0x2DFF), (0xA640, 0xA69F)),
    "arabic": ((0x0600, 0x06FF), (0x0750, 0x077F), (0x0870, 0x08FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFC)),
    "greek": ((0x0370, 0x03FF), (0x1F00, 0x1FFF)),
    "latin": ((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0xD6), (0xD8, 0xF6), (0xF8, 0x24F), (0x1E00, 0x1EFF)),
}  # fmt: skip


def has_script(script: str, first: int, last: int | None = None) -> bool:
    """Whether a code point, or all of `first` to `last`, are of a script."""
    last = first if last is None else last
    return any(begin <= first and last <= end for begin, end in SCRIPTS[script])


def derive(piece: str, order: Callable[[str, str], float | None]) -> list[str] | None:
    """All pieces that merging makes on the way from a piece's characters to the piece, its characters first.

    Byte-pair encoding as both libraries do it: the pair of neighbours that comes first in `order` is merged, the
    leftmost where several do. What stands around the piece in a text changes nothing about it: a merge across its edge
    would mean that the piece is not made there.

    Args:
        piece: as the vocabulary spells it.
        order: of two neighbours; none when they make no piece.

    Returns:
        The piece itself comes last; None when merging ends in something else, so that no text gives the piece.
    """
    symbols = list(piece)
    made = list(symbols)
    while len(symbols) > 1:
        found = [
            (place, at)
            for at, (left, right) in enumerate(pairwise(symbols))
            if (place := order(left, right)) is not None
        ]
        if not found:
            return None
        at = min(found)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        made.append(symbols[at])
    return made


class Mergeable(Protocol):
    """A base vocabulary, as choosing needs to know it.

    Attributes:
        known: its pieces, and their ids.
    """

    known: Mapping[str, int]

    def order(self, left: str, right: str, added: Mapping[str, int]) -> float | None:
        """When two neighbours are merged, the first lowest; None when they make no piece.

        Args:
            left: the first.
            right: the second.
            added: places of added pieces in their order of merging.
        """
        ...

    def in_script(self, piece: str, script: str) -> bool:
        """Whether only text with a character of the script holds the piece, one that is `writable`."""
        ...

    def writable(self, piece: str) -> bool:
        """Whether the tokenizer leaves the piece whole until merging begins."""
        ...

    def stands_alone(self, piece: str) -> bool:
        """Whether the piece is text, not a part of a character's bytes."""
        ...


@dataclass(frozen=True)
class Selection:
    """What is added to a vocabulary.

    Attributes:
        added: new pieces, in the donor's order of merging.
        left_out: the donor's other pieces, by reason: `known` to the base, of `other_script`, `unreachable` (no text
            gives them, or a character of theirs has no piece), `rare`, `cut` (no room).
    """

    added: list[str]
    left_out: dict[str, int]


def select(
    donor: Sequence[str],
    base: Mergeable,
    *,
    script: str | None,
    counts: Mapping[str, int] | None,
    minimum_count: int,
    room: Callable[[int], int],
) -> Selection:
    """Choose the pieces to add.

    A piece comes with all that it is made of, however rare that is; one that there is no room for is passed over, and
    less demanding ones after it still come in, so that the room is used to the last row.

    Args:
        donor: its pieces, each once, in its order of merging.
        base: what they are added to.
        script: take only pieces that occur in no text without a character of this script; all when not given.
        counts: how often a corpus holds each piece; the donor's own order decides when not given.
        minimum_count: rarer pieces come in only to fill the room that is left.
        room: how many pieces may be added, given how many there are that `minimum_count` lets through.
    """
    new = [piece for piece in donor if piece not in base.known]
    writable = [piece for piece in new if base.writable(piece)]
    listed = [piece for piece in writable if script is None or base.in_script(piece, script)]
    places = {piece: place for place, piece in enumerate(listed)}
    needs: dict[str, list[str]] = {}
    for piece in places:
        made = derive(piece, lambda left, right: base.order(left, right, places))
        if made is not None and all(part in base.known or part in places for part in made):
            needs[piece] = [part for part in dict.fromkeys(made) if part in places]
    ranked = [piece for piece in needs if base.stands_alone(piece)]
    frequent = len(ranked)
    if counts is not None:
        ranked.sort(key=lambda piece: -counts.get(piece, 0))
        frequent = sum(counts.get(piece, 0) >= minimum_count for piece in ranked)
    limit = room(len({part for piece in ranked[:frequent] for part in needs[piece]}))
    chosen: set[str] = set()
    for piece in ranked:
        missing = [part for part in needs[piece] if part not in chosen]
        if len(chosen) + len(missing) <= limit:
            chosen.update(missing)
    parts_only = sum(not base.stands_alone(piece) for piece in chosen)
    left_out = {
        "known": len(donor) - len(new),
        "other_script": len(writable) - len(listed),
        "unreachable": len(new) - len(writable) + len(listed) - len(ranked) - parts_only,
        "rare": sum(piece not in chosen for piece in ranked[frequent:]),
        "cut": sum(piece not in chosen for piece in ranked[:frequent]),
    }
    return Selection([piece for piece in places if piece in chosen], left_out)

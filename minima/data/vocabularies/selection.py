"""Selection of the donor's pieces to add: those of a script, the most frequent first, closed under merges.

Added pieces keep the donor's merge order, after all of the base's; counts only decide which pieces are included. So how
a piece is merged does not depend on the selection: the merges that build it from its characters when all candidates are
present are the same when only the pieces of that sequence are, because removing other pieces removes only merges that
were not made. Hence a selection that includes, with each piece, everything it is made of has no unreachable piece.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

# Punctuation that no other script uses: CJK punctuation and the full-width forms of ASCII punctuation.
_EAST_ASIAN = (
    (0x3001, 0x3003), (0x3008, 0x3011), (0x3014, 0x301F),
    (0xFF01, 0xFF0F), (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF65),
)  # fmt: skip
# Unicode's blocks (Blocks.txt): scripts grow within their blocks, and planes 2 and 3 are reserved for Han entirely.
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
    """Whether a code point, or all from `first` to `last`, belong to a script."""
    last = first if last is None else last
    return any(begin <= first and last <= end for begin, end in SCRIPTS[script])


def derive(piece: str, order: Callable[[str, str], float | None]) -> list[str] | None:
    """All pieces that merging makes on the way from a piece's characters to the piece, starting with the characters.

    Byte-pair encoding as both libraries do it: the adjacent pair that is first in `order` is merged, the leftmost of
    equals. The text around the piece does not matter: a merge across its edge would mean that the piece is not made
    there.

    Args:
        piece: in the vocabulary's spelling.
        order: rank of two adjacent pieces; None if they do not merge.

    Returns:
        The pieces, ending with the piece itself; None if merging ends in something else, so that no text gives it.
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
    """The interface of a base vocabulary that the selection needs.

    Attributes:
        known: its pieces and their ids.
    """

    known: Mapping[str, int]

    def order(self, left: str, right: str, added: Mapping[str, int]) -> float | None:
        """The merge rank of two adjacent pieces, lowest first; None if they do not merge.

        Args:
            added: added pieces and their places in merge order.
        """
        ...

    def in_script(self, piece: str, script: str) -> bool:
        """Whether a `writable` piece occurs only in text with a character of the script."""
        ...

    def writable(self, piece: str) -> bool:
        """Whether the tokenizer's normalizer and pre-tokenizer leave the piece whole."""
        ...

    def stands_alone(self, piece: str) -> bool:
        """Whether the piece is text, not part of a character's bytes."""
        ...


@dataclass(frozen=True)
class Selection:
    """The pieces to add to a vocabulary."""

    added: list[str]  # new pieces, in the donor's merge order
    # numbers of the donor's other pieces, by reason: `known` to the base, of `other_script`, `unreachable` (no text
    # gives them, or one of their characters has no piece), `rare`, `cut` (no room)
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

    A piece is added with everything it is made of, however rare. A piece that does not fit is skipped, but later ones
    that need less room may still be added, so that the room is used to the last row.

    Args:
        donor: its pieces, without duplicates, in merge order.
        script: use only pieces that occur in no text without a character of this script; all if not given.
        counts: how often each piece occurs in a corpus; if not given, the donor's own order decides.
        minimum_count: rarer pieces are added only to fill remaining room.
        room: maps the number of pieces that pass `minimum_count` to the number that may be added.
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

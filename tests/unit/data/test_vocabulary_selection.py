"""What is chosen is closed under merges, whatever the cut."""

import random
from collections import Counter

import pytest

from minima.data.vocabularies.selection import derive, has_script, select


class Base:
    """Single letters, and one piece of two that is merged first."""

    known = {"a": 0, "b": 1, "c": 2, "d": 3, "bc": 4}

    def order(self, left, right, added):
        piece = left + right
        return -1 if piece == "bc" else added.get(piece)

    def in_script(self, piece, script):
        return "d" in piece

    def writable(self, piece):
        return "!" not in piece

    def stands_alone(self, piece):
        return not piece.startswith("_")


def chosen(donor, room=100, **settings):
    asked = {"script": None, "counts": None, "minimum_count": 1} | settings
    return select(donor, Base(), room=room if callable(room) else lambda passing: room, **asked)


def test_merging_takes_the_first_in_order_and_the_leftmost_of_equals():
    order = {"ab": 2, "bc": 1, "abc": 3, "aa": 4, "aaa": 5}
    assert derive("abc", lambda left, right: order.get(left + right)) == ["a", "b", "c", "bc", "abc"]
    assert derive("aaa", lambda left, right: order.get(left + right)) == ["a", "a", "a", "aa", "aaa"]
    assert derive("abcd", lambda left, right: order.get(left + right)) is None
    assert derive("a", lambda left, right: None) == ["a"]


def test_a_piece_that_old_merges_cut_through_is_not_added():
    """`bc` is merged before anything that is added, so nothing makes `abcd` of a, bc and d."""
    assert chosen(["ab", "cd", "abcd"]).added == ["ab", "cd"]
    assert chosen(["ab", "cd", "abc", "abcd"]).added == ["ab", "cd", "abc", "abcd"]


def test_a_piece_comes_with_what_it_is_made_of_however_rare():
    donor = ["dd", "ddd", "da", "db"]
    counts = {"ddd": 9, "da": 5, "db": 4}
    assert chosen(donor, room=3, counts=counts).added == ["dd", "ddd", "da"]
    assert chosen(donor, room=1, counts=counts).added == ["da"]  # for `ddd` there is no room, for `da` there is
    assert chosen(donor, counts=counts, minimum_count=5, room=lambda passing: passing).added == ["dd", "ddd", "da"]


def test_room_beyond_what_passes_goes_to_the_rarer_ones():
    found = chosen(["da", "db", "dc"], counts={"da": 5, "db": 1}, minimum_count=5, room=lambda passing: passing + 1)
    assert found.added == ["da", "db"]
    assert found.left_out["rare"] == 1


def test_what_is_left_out_is_counted():
    found = chosen(["bc", "ab", "da", "d!", "xd", "dc", "db"], room=1, script="any", counts={"da": 1, "dc": 1})
    assert found.added == ["da"]
    assert found.left_out == {"known": 1, "other_script": 1, "unreachable": 2, "rare": 1, "cut": 1}


def test_what_is_no_text_by_itself_comes_as_a_part_only():
    assert chosen(["x"]).added == ["x"]  # a letter that the base lacks
    assert chosen(["_", "_a"]).added == []
    assert chosen(["_", "_a", "d", "da", "b_", "cb_"]).added == ["_", "da", "b_", "cb_"]


@pytest.mark.parametrize("seed", range(5))
def test_every_cut_of_a_random_donor_is_alive(seed):
    """The whole donor decides how a piece is made, and the pieces of the cut alone make it the same way."""
    drawn = random.Random(seed)
    donor = list(dict.fromkeys("".join(drawn.choices("abcd", k=drawn.randint(2, 6))) for _ in range(2000)))
    counts = Counter({piece: drawn.randint(0, 50) for piece in donor})
    for room in (10, 100, 400):
        added = chosen(donor, room=room, counts=counts).added
        assert len(added) == room
        places = {piece: place for place, piece in enumerate(added)}
        for piece in added:
            assert derive(piece, lambda left, right: Base().order(left, right, places)) is not None  # noqa: B023


@pytest.mark.parametrize(
    ("script", "inside", "outside"),
    [
        ("han", "中々〇㐀龯𠀀𪜀𰀀。，", "aあア가·“"),
        ("hiragana", "あん", "ア中"),
        ("katakana", "アー", "あ中"),
        ("hangul", "가ㄱ", "中a"),
        ("cyrillic", "яЖѐ", "aα"),
        ("arabic", "عﷲ", "aא"),
        ("greek", "αἀ", "aж"),
        ("latin", "aZéßĀ", "中1×αж"),
    ],
)
def test_scripts(script, inside, outside):
    assert all(has_script(script, ord(character)) for character in inside)
    assert not any(has_script(script, ord(character)) for character in outside)

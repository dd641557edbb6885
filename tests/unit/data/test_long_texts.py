"""A text of many megabytes is encoded piece by piece, with the ids of the whole."""

import pytest
from transformers import AutoTokenizer

from minima.data import long_texts
from minima.data.documents import HeldOut
from minima.data.encoding import Encoder, EncodingTask

KINDS = ["tokenizer", "beginning", "byte_level"]


@pytest.fixture
def encode(request, monkeypatch):
    """Encodes texts with the tokenizer of that name; gives the ids, and the length of the longest text it was given."""

    def run(name, texts, piece_characters):
        encoder, longest = Encoder(request.getfixturevalue(name), 2, 600, begin_token=1), 0
        backend = encoder._encode

        def watched(texts):
            nonlocal longest
            longest = max([longest, *map(len, texts)])
            return backend(texts)

        monkeypatch.setattr(encoder, "_encode", watched)
        monkeypatch.setattr(long_texts, "PIECE_CHARACTERS", piece_characters)
        documents = encoder(EncodingTask(texts, HeldOut(0.0, 0))).documents
        return documents.ids.tolist(), documents.lengths.tolist(), longest

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_give_the_ids_of_the_whole(encode, addresses, kind):
    texts = ["short", " ".join(addresses[:200]), "", "  \n".join(addresses[200:300]) + " \n", "the end"]
    whole, lengths, longest = encode(kind, texts, 1 << 20)
    assert longest > 10_000
    in_pieces, their_lengths, longest = encode(kind, texts, 1000)
    assert (in_pieces, their_lengths) == (whole, lengths)
    assert longest < 2000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text", ["春眠不覺曉處處聞啼鳥" * 300, "x" * 3000, "7 7 7 " * 500, "a  b\n" * 600, "\u0301 e" * 900]
)
def test_a_text_without_a_safe_place_stays_whole(encode, text, kind):
    assert encode(kind, [text], 1000)[:2] == encode(kind, [text], 1 << 20)[:2]


def test_a_text_without_spaces_is_cut_before_a_line(byte_level, monkeypatch):
    encode, text = Encoder(byte_level, 2, 600)._encode, "春眠不覺曉，\n處處聞啼鳥。\n\n" * 200
    monkeypatch.setattr(long_texts, "PIECE_CHARACTERS", 300)
    pieces = list(long_texts.pieces(text, encode))
    assert max(map(len, pieces)) < 400
    assert [number for piece in pieces for number in encode([piece])[0]] == encode([text])[0]


def test_no_cut_through_a_token_with_a_space(byte_level, tmp_path, monkeypatch):
    """A token that was added to a tokenizer may contain one."""
    loaded = AutoTokenizer.from_pretrained(byte_level)
    loaded.add_tokens(["United States"])
    loaded.save_pretrained(tmp_path)
    encode, text = Encoder(tmp_path, 2, 700)._encode, "the United States of " * 100
    monkeypatch.setattr(long_texts, "PIECE_CHARACTERS", len("the United"))
    pieces = list(long_texts.pieces(text, encode))
    assert len(pieces) > 50
    assert [number for piece in pieces for number in encode([piece])[0]] == encode([text])[0]

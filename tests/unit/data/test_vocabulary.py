"""Sizes, filters and what is held out, for any kind of tokenizer."""

from pathlib import Path

import pytest

from minima.assets import read_text_asset
from minima.data.documents import HeldOut
from minima.data.piece_training import train_sentencepiece
from minima.data.tokenizer import load_tokenizer
from minima.data.vocabularies.growing import expand, open_base
from minima.data.vocabularies.sentencepiece import SentencePieceDonor, read_model
from minima.errors import DataError, ShapeError
from minima.recipe.vocabulary import ExpandVocabulary

POEMS = [record["text"] for record, _ in zip(read_text_asset("poems"), range(400), strict=False)]


def stage(**settings) -> ExpandVocabulary:
    asked = {"name": "grow", "kind": "expand_vocabulary", "model": "m", "donor": "d", "script": "han"} | settings
    return ExpandVocabulary.model_validate(asked)


@pytest.fixture(scope="module")
def donor(tmp_path_factory) -> Path:
    """4,500 pieces: characters mostly."""
    path = tmp_path_factory.mktemp("donor") / "donor.model"
    path.write_bytes(train_sentencepiece(POEMS, 4500))
    return path


@pytest.fixture
def grow(tokenizer, donor, tmp_path):
    def grow(rows=512, **settings):
        return expand(stage(**settings), open_base(tokenizer), donor, rows, tmp_path / "grown").metrics

    return grow


def test_without_a_size_all_that_pass_come_and_rows_are_rounded_up(grow, caplog):
    metrics = grow()
    assert metrics["left_out"]["cut"] == 0
    assert metrics["vocabulary"] % 64 == 0
    assert 0 <= metrics["reserved"] == metrics["vocabulary"] - 512 - metrics["pieces_added"] < 64
    assert ("rows have no piece" in caplog.text) == (metrics["reserved"] > 0)


def test_rows_up_to_the_multiple_go_to_rarer_pieces(grow, jsonl):
    metrics = grow(count_on=[{"path": jsonl(POEMS[:40])}], minimum_count=3)
    assert metrics["reserved"] == 0
    assert metrics["left_out"]["rare"] > 1000
    assert grow(multiple=1, count_on=[{"path": jsonl(POEMS[:40])}], minimum_count=3)["pieces"] > metrics["pieces"] - 64


def test_a_size_that_cannot_be_filled_leaves_reserved_rows_and_says_so(grow, caplog):
    metrics = grow(size=8192)
    assert metrics["vocabulary"] == 8192
    assert metrics["reserved"] == 8192 - 512 - metrics["pieces_added"] > 3000
    assert f"{metrics['reserved']} rows have no piece" in caplog.text


def test_a_size_is_filled_with_pieces_that_no_text_was_seen_with_unless_that_is_asked_for(grow, jsonl):
    count_on = [{"path": jsonl(POEMS[:40])}]
    assert grow(size=2560, count_on=count_on)["reserved"] == 0
    metrics = grow(size=2560, count_on=count_on, minimum_count=1)
    assert metrics["reserved"] > 500
    assert metrics["left_out"]["rare"] > 500


def test_rows_that_no_old_id_uses_are_given_to_new_pieces(grow):
    metrics = grow(rows=640, size=640)
    assert (metrics["vocabulary_before"], metrics["vocabulary"], metrics["pieces_added"]) == (640, 640, 128)
    assert grow(rows=6400)["vocabulary"] == 6400  # a model does not lose rows


def test_new_ids_begin_where_the_old_ones_end_whatever_rows_the_model_has(donor, tokenizer, tmp_path):
    found = expand(stage(size=640), open_base(tokenizer), donor, 600, tmp_path / "grown")
    ids = set(load_tokenizer(tmp_path / "grown").get_vocab().values())
    assert ids - set(load_tokenizer(tokenizer).get_vocab().values()) == set(range(512, 640))
    assert found.first == 512 and len(found.origins) == 128


@pytest.mark.parametrize(("rows", "size"), [(512, 448), (512, 512), (640, 576)])
def test_a_size_without_room_is_refused(grow, rows, size):
    with pytest.raises(ShapeError, match=f"size {size}"):
        grow(rows=rows, size=size)


def test_no_piece_at_all_is_refused(grow):
    with pytest.raises(DataError, match=r"no piece of the donor is added \(.*other script"):
        grow(script="arabic")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 1000}, "choose 960 or 1024"),
        ({"minimum_count": 3}, "no count_on"),
        ({"model": {"random": {"vocabulary_size": 9, "hidden_size": 4, "intermediate_size": 4, "num_layers": 1,
                               "num_heads": 1}}}, "names no tokenizer"),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be_done_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        stage(**settings)


def test_what_only_held_out_text_has_does_not_count(grow, donor, tokenizer, jsonl, tmp_path):
    aside = HeldOut(0.3, 5).mask([poem.encode() for poem in POEMS])
    kept = {character for poem, out in zip(POEMS, aside, strict=True) if not out for character in poem}
    only_aside = set("".join(POEMS)) - kept
    assert len(only_aside & set(SentencePieceDonor(read_model(donor)).pieces)) > 100
    metrics = grow(multiple=1, count_on=[{"path": jsonl(POEMS)}], held_out_fraction=0.3, seed=5)
    added = open_base(tmp_path / "grown").known.keys() - open_base(tokenizer).known.keys()
    assert len(added) == metrics["pieces_added"] > 1000
    assert not only_aside & added
    assert metrics["left_out"]["rare"] > 100


def test_a_source_without_held_out_text_is_refused(grow, jsonl):
    with pytest.raises(DataError, match="no document of source 'one' is held out"):
        grow(report_on=[{"path": jsonl(["an address"]), "name": "one"}])


def test_records_that_are_no_text_are_counted(grow, tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"text": "春眠不覺曉"}\n{"text": 5}\n{broken\n', encoding="utf-8")
    assert grow(count_on=[{"path": str(tmp_path / "odd.jsonl")}])["rejected"] == {
        "count_on": {"not_text": 1, "broken_json": 1}
    }


def test_without_a_script_old_tokens_of_any_text_may_be_joined_but_all_come_back(tokenizer, tmp_path, addresses):
    """The donor knows more English: text gets shorter, by joining whole old tokens only."""
    path = tmp_path / "donor.model"
    path.write_bytes(train_sentencepiece(addresses, 1500))
    asked = ExpandVocabulary(name="grow", kind="expand_vocabulary", model="m", donor="d")
    expand(asked, open_base(tokenizer), path, 512, tmp_path / "grown")
    from minima.data.tokenizer import load_tokenizer

    old, new = load_tokenizer(tokenizer), load_tokenizer(tmp_path / "grown")
    assert new.batch_decode(new(addresses)["input_ids"]) == addresses
    for text in addresses[:50]:
        before = [end for _, end in old(text, return_offsets_mapping=True)["offset_mapping"]]
        after = [end for _, end in new(text, return_offsets_mapping=True)["offset_mapping"]]
        assert len(after) < len(before)
        assert set(after) <= set(before)

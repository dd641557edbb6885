"""A grown SentencePiece tokenizer: both of its files agree, old text keeps its ids, and every new piece is alive."""

import json
import shutil

import pytest
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
from tokenizers import Tokenizer

from minima.assets import read_text_asset
from minima.data.tokenizer import ends_added, load_tokenizer
from minima.data.vocabularies.growing import expand, open_base
from minima.data.vocabularies.sentencepiece import SentencePieceVocabulary, read_model
from minima.errors import DataError
from minima.recipe.vocabulary import ExpandVocabulary

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def stage(**settings) -> ExpandVocabulary:
    asked = {"name": "grow", "kind": "expand_vocabulary", "model": "m", "donor": "d", "script": "han"} | settings
    return ExpandVocabulary.model_validate(asked)


@pytest.fixture(scope="module")
def poems() -> list[str]:
    return [record["text"] for record, _ in zip(read_text_asset("poems"), range(600), strict=False)]


@pytest.fixture(scope="module")
def source(poems, jsonl):
    return {"path": jsonl(poems), "name": "poems"}


@pytest.fixture(scope="module")
def grown(tokenizer, source, tmp_path_factory):
    """A tokenizer of 512 pieces grown to 1,024 with a donor that is trained on poems."""
    folder = tmp_path_factory.mktemp("grown")
    asked = stage(
        donor={"vocabulary_size": 1600, "sources": [source]}, size=1024, count_on=[source], report_on=[source],
        held_out_fraction=0.1,
    )  # fmt: skip
    return expand(asked, open_base(tokenizer), asked.donor, 512, folder), folder


@pytest.fixture(scope="module")
def merged(grown) -> ModelProto:
    return read_model(grown[1] / "tokenizer.model")


def bare(model: ModelProto) -> sentencepiece.SentencePieceProcessor:
    """Reads a piece as it stands, with no space before it."""
    copy = ModelProto.FromString(model.SerializeToString())
    copy.normalizer_spec.add_dummy_prefix = False
    return sentencepiece.SentencePieceProcessor(model_proto=copy.SerializeToString())


def test_no_piece_is_dead(merged, grown):
    spm, fast = bare(merged), Tokenizer.from_file(str(grown[1] / "tokenizer.json"))
    assert len(merged.pieces) == 1024
    for number in range(512, 1024):
        piece = merged.pieces[number].piece
        assert spm.encode(piece) == [number], piece
        assert [token.id for token in fast.model.tokenize(piece)] == [number], piece


def test_scores_are_distinct_and_below_all_old_ones(merged):
    scores = [piece.score for piece in merged.pieces if piece.type == NORMAL]
    old, new = scores[: 512 - 259], scores[512 - 259 :]
    assert len(set(new)) == 512 == len(new)
    assert new == sorted(new, reverse=True)
    assert max(new) < min(old)


def test_old_text_keeps_its_ids(tokenizer, grown):
    """All addresses, and each of them through both files."""
    old, new = load_tokenizer(tokenizer), load_tokenizer(grown[1])
    spm = sentencepiece.SentencePieceProcessor(model_file=str(grown[1] / "tokenizer.model"))
    texts = [record["text"] for record in read_text_asset("sotu")][::16]
    ids = old(texts)["input_ids"]
    assert ids == new(texts)["input_ids"] == spm.encode(texts)


def test_pairs_of_new_pieces_come_after_all_old_ones(tokenizer):
    base = SentencePieceVocabulary(tokenizer)
    pairs = [(piece[:1], piece[1:]) for piece in list(base.known)[259:] if len(piece) > 1]
    old = [base.order(left, right, {}) for left, right in pairs]
    new = [base.order("太", right, {"太宗": 0, "太祖": 1}) for right in ("宗", "祖")]
    assert max(old) < new[0] < new[1] and base.order("太", "太", {"太宗": 0}) is None


def test_a_donors_pieces_are_in_merge_order_and_have_no_space_inside(tokenizer, tmp_path):
    model = read_model(tokenizer / "tokenizer.model")
    model.pieces.add(piece="▁of▁the", score=2.0, type=NORMAL)
    model.pieces.add(piece="last, but merged first", score=1.0, type=NORMAL)
    (tmp_path / "donor.model").write_bytes(model.SerializeToString())
    found = SentencePieceVocabulary(tokenizer).read_donor(tmp_path / "donor.model").pieces
    assert found[0] == "last, but merged first" and "▁of▁the" not in found and len(found) == 512 - 259 + 1


def test_both_files_and_all_loaders_agree_and_text_comes_back(grown, poems, addresses):
    fast, raw = load_tokenizer(grown[1]), Tokenizer.from_file(str(grown[1] / "tokenizer.json"))
    spm = sentencepiece.SentencePieceProcessor(model_file=str(grown[1] / "tokenizer.model"))
    mixed = [f"{address[:200]}{poem}" for address, poem in zip(addresses, poems, strict=False)]
    ids = fast(poems + mixed)["input_ids"]
    assert ids == spm.encode(poems + mixed)
    assert ids == [encoding.ids for encoding in raw.encode_batch(poems + mixed)]
    assert fast.batch_decode(ids) == poems + mixed
    assert sum(token >= 512 for document in ids for token in document) > 10_000


def test_a_text_begins_as_with_the_base(tokenizer, beginning, tmp_path):
    for base, adds in ((tokenizer, False), (beginning, True)):
        open_base(base).write(tmp_path / base.name, ["龍"])
        assert ends_added(load_tokenizer(tmp_path / base.name)) == (adds, False)


def test_the_report(grown, tokenizer, poems):
    metrics = grown[0].metrics
    assert (metrics["vocabulary_before"], metrics["vocabulary"]) == (512, 1024)
    assert (metrics["pieces_added"], metrics["reserved"]) == (512, 0)
    assert sum(metrics["left_out"].values()) + 512 == metrics["donor_pieces"]
    lengths = metrics["tokens_per_character"]["poems"]
    assert lengths["after"] < 0.6 * lengths["before"]
    whole = load_tokenizer(tokenizer)(poems)["input_ids"]  # the held-out tenth is about as long as all
    assert lengths["before"] == pytest.approx(sum(map(len, whole)) / sum(map(len, poems)), rel=0.05)


def test_new_rows_start_from_the_old_tokens_of_the_text_in_place(grown, merged, tokenizer):
    old = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
    assert len(grown[0].origins) == 512
    for piece, origin in zip(merged.pieces[512:], grown[0].origins, strict=True):
        assert old.decode(origin) == piece.piece.replace("▁", "")
        if not piece.piece.startswith("▁"):
            assert origin == old.encode(f"\n{piece.piece}")[2:]  # behind a space and the byte of a line break
            assert len(origin) == 3 * len(piece.piece)  # every character is spelt in three bytes


def test_a_lone_model_with_runs_of_spaces_gets_a_twin(tokenizer, merged, tmp_path, poems):
    """As Mistral's and Llama's: pieces of several spaces with one score, far below all others."""
    odd = read_model(tokenizer / "tokenizer.model")
    for length in (2, 4, 3):
        odd.pieces.add(piece="▁" * length, score=-1e9, type=NORMAL)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.model").write_bytes(odd.SerializeToString())
    (tmp_path / "donor.model").write_bytes(merged.SerializeToString())
    asked = stage(size=960)
    found = expand(asked, open_base(tmp_path / "base"), tmp_path / "donor.model", 515, tmp_path / "grown")
    assert (found.first, found.metrics["pieces_added"]) == (515, 445)
    grown = read_model(tmp_path / "grown" / "tokenizer.model")
    scores = [piece.score for piece in grown.pieces][512:]
    assert scores[:3] == [-1e9] * 3
    assert len(set(scores[3:])) == 445
    assert max(scores[3:]) < -1e9
    fast = load_tokenizer(tmp_path / "grown")
    assert type(fast) is type(load_tokenizer(tmp_path / "base"))
    spm = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "grown" / "tokenizer.model"))
    texts = [*poems, "a  b    中", "    x"]
    assert fast(poems, add_special_tokens=False)["input_ids"] == spm.encode(poems)
    base = load_tokenizer(tmp_path / "base")
    assert base("a  b    c")["input_ids"] == fast("a  b    c")["input_ids"]
    assert [fast.decode(ids) for ids in fast(texts[:-1])["input_ids"]] == texts[:-1]


def test_tokens_that_only_transformers_knows_become_pieces(tokenizer, tmp_path, merged):
    loaded = load_tokenizer(tokenizer)
    loaded.add_special_tokens({"pad_token": "<pad>"})
    loaded.add_tokens(["[role]"])
    loaded.chat_template = "{{ messages[0].content }}"
    loaded.save_pretrained(tmp_path / "base")
    shutil.copyfile(tokenizer / "tokenizer.model", tmp_path / "base" / "tokenizer.model")
    (tmp_path / "donor.model").write_bytes(merged.SerializeToString())
    base = open_base(tmp_path / "base")
    assert base.size == 514
    expand(stage(size=640), base, tmp_path / "donor.model", 514, tmp_path / "grown")
    grown, fast = read_model(tmp_path / "grown" / "tokenizer.model"), load_tokenizer(tmp_path / "grown")
    assert [(piece.piece, piece.type) for piece in grown.pieces[512:514]] == [
        ("<pad>", CONTROL),
        ("[role]", USER_DEFINED),
    ]
    assert fast.get_vocab() == {piece.piece: index for index, piece in enumerate(grown.pieces)}
    assert (fast.pad_token_id, fast.chat_template) == (512, loaded.chat_template)


def test_an_old_piece_that_an_added_one_is_part_of_is_merged_by_both(tokenizer, tmp_path):
    odd = read_model(tokenizer / "tokenizer.model")
    for piece in ("甲", "乙", "丙", "甲乙丙"):  # dead in the base: no two of its pieces make it
        odd.pieces.add(piece=piece, score=odd.pieces[-1].score - 1, type=NORMAL)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.model").write_bytes(odd.SerializeToString())
    donor = ModelProto.FromString(odd.SerializeToString())
    donor.pieces.add(piece="甲乙", score=-9e5, type=NORMAL)
    (tmp_path / "donor.model").write_bytes(donor.SerializeToString())
    expand(stage(), open_base(tmp_path / "base"), tmp_path / "donor.model", 516, tmp_path / "grown")
    spm = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "grown" / "tokenizer.model"))
    raw = Tokenizer.from_file(str(tmp_path / "grown" / "tokenizer.json"))
    assert spm.encode("x甲乙丙")[-1] == 515 == raw.encode("x甲乙丙").ids[-1]
    assert spm.encode("x甲乙")[-1] == 516 == raw.encode("x甲乙").ids[-1]


def _unigram(model):
    model.trainer_spec.model_type = TrainerSpec.UNIGRAM


def _twice(model):
    model.pieces.add(piece=model.pieces[300].piece, score=-1e6, type=NORMAL)


def _empty(model):
    model.pieces.add(piece="", score=-1e6, type=NORMAL)


DAMAGES = [(_unigram, "type unigram"), (_twice, "repeats piece 300"), (_empty, "512.*is empty")]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_model_that_is_no_bpe_or_is_damaged_is_refused(tokenizer, tmp_path, damage, message):
    model = read_model(tokenizer / "tokenizer.model")
    damage(model)
    (tmp_path / "donor.model").write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match=message):
        expand(stage(), open_base(tokenizer), tmp_path / "donor.model", 512, tmp_path / "grown")
    assert not (tmp_path / "grown").exists()


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"not a model at all")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        read_model(tmp_path / "tokenizer.model")


def test_files_of_two_tokenizers_in_one_folder_are_refused(tokenizer, tmp_path):
    shutil.copytree(tokenizer, tmp_path / "base")
    path = tmp_path / "base" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    first, second = (next(piece for piece, index in vocabulary.items() if index == number) for number in (400, 401))
    vocabulary[first], vocabulary[second] = 401, 400
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    with pytest.raises(DataError, match="id 400 is"):
        SentencePieceVocabulary(tmp_path / "base")


def test_training_a_donor_is_deterministic_and_learns_more_than_characters(tokenizer, poems):
    base = SentencePieceVocabulary(tokenizer)
    texts = [poem.replace(" ", "") for poem in poems]
    first, second = (base.train_donor(iter(texts), 1000).pieces for _ in range(2))
    assert first == second
    assert 200 < sum(len(piece) == 1 for piece in first) <= (1000 - 259) // 2
    assert not any(piece.startswith("▁") for piece in first)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), "no text"])
def test_a_model_that_says_nothing_of_merging_is_refused(tokenizer, tmp_path, wrong):
    odd = read_model(tokenizer / "tokenizer.model")
    if wrong == "no text":
        del odd.pieces[259:]  # control pieces and bytes
    else:
        odd.pieces[300].score = wrong
    (tmp_path / "tokenizer.model").write_bytes(odd.SerializeToString())
    with pytest.raises(DataError, match="has no text pieces" if wrong == "no text" else "piece 300 of .*a score of"):
        open_base(tmp_path)

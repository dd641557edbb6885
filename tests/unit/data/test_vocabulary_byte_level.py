"""A grown byte-level BPE: old text keeps its ids, every new piece is alive, special tokens and template stay."""

import json
import shutil

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from minima.assets import read_text_asset
from minima.data.tokenizer import load_tokenizer
from minima.data.vocabularies.byte_level import ByteLevelVocabulary, read_content
from minima.data.vocabularies.growing import expand, open_base
from minima.errors import DataError, TokenizerMismatch
from minima.recipe.vocabulary import ExpandVocabulary

LETTERS = pre_tokenizers.ByteLevel.alphabet()


def stage(**settings) -> ExpandVocabulary:
    asked = {"name": "grow", "kind": "expand_vocabulary", "model": "m", "donor": "d", "script": "han"} | settings
    return ExpandVocabulary.model_validate(asked)


def train(texts, size) -> Tokenizer:
    fast = Tokenizer(models.BPE())
    fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=LETTERS, show_progress=False))
    return fast


@pytest.fixture(scope="module")
def poems() -> list[str]:
    return [record["text"] for record, _ in zip(read_text_asset("poems"), range(600), strict=False)]


@pytest.fixture(scope="module")
def base(addresses, tmp_path_factory):
    """500 pieces, and as ids 500 and 501 two tokens that are in no vocabulary but the added one."""
    folder = tmp_path_factory.mktemp("base")
    fast = train(addresses, 500)
    fast.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<|user|>", special=True)])
    loaded = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|end|>")
    loaded.chat_template = "{{ messages[0].content }}"
    loaded.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def donor(poems, tmp_path_factory):
    path = tmp_path_factory.mktemp("donor") / "tokenizer.json"
    train(poems, 1500).save(str(path))
    return path


@pytest.fixture(scope="module")
def grown(base, donor, jsonl, poems, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grown")
    source = {"path": jsonl(poems), "name": "poems"}
    asked = stage(size=1024, count_on=[source], report_on=[source], held_out_fraction=0.1)
    return expand(asked, open_base(base), donor, 502, folder), folder


def test_no_piece_is_dead(grown):
    fast = Tokenizer.from_file(str(grown[1] / "tokenizer.json"))
    assert fast.get_vocab_size() == 1024
    texts = 0
    for index in range(502, 1024):
        piece = fast.id_to_token(index)
        assert [token.id for token in fast.model.tokenize(piece)] == [index], piece
        text = fast.decode([index])
        if "\ufffd" not in text:  # else it is a part of a character
            texts += 1
            assert fast.encode(text).ids == [index], text
    assert texts > 300


def test_old_text_keeps_its_ids(base, grown):
    old, new = load_tokenizer(base), load_tokenizer(grown[1])
    texts = [record["text"] for record in read_text_asset("sotu")][::16]
    texts += ["naïve – “quoted” … €5 ‘x’ 3×4 ½ ☃ жук αβγ עברית カナ 한글 🙂\u200b"]
    assert old(texts)["input_ids"] == new(texts)["input_ids"]
    merges = [json.loads((folder / "tokenizer.json").read_text())["model"]["merges"] for folder in (base, grown[1])]
    assert merges[1][: len(merges[0])] == merges[0], "text of any script: old pieces are merged first"


def test_pairs_of_new_pieces_come_after_all_old_ones_in_the_order_of_the_file(base):
    vocabulary, (left, right) = ByteLevelVocabulary(base), ("é¡", "æ°´")
    added = {left + right + left: 0, left + right: 1}
    parts = [(left, right + left), (left + right, left), (left, right)]
    ranks = [vocabulary.order(*pair, added) for pair in parts]
    assert 500 - 256 - 2 <= len(json.loads((base / "tokenizer.json").read_text())["model"]["merges"]) <= ranks[0]
    assert ranks == sorted(ranks) and len(set(ranks)) == 3
    assert vocabulary.order(right, right, added) is None


def test_new_ids_come_after_the_highest_old_one(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    path = tmp_path / "base" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[next(piece for piece, index in vocabulary.items() if index == 499)] = 700
    path.write_text(json.dumps(content))
    assert open_base(tmp_path / "base").size == 701


def test_text_comes_back_and_is_shorter(grown, poems):
    fast = load_tokenizer(grown[1])
    assert fast.batch_decode(fast(poems)["input_ids"]) == poems
    lengths = grown[0].metrics["tokens_per_character"]["poems"]
    assert lengths["after"] < 0.6 * lengths["before"]
    assert grown[0].metrics["kind"] == "byte-level BPE"


def test_special_tokens_and_template_stay(base, grown):
    old, new = load_tokenizer(base), load_tokenizer(grown[1])
    assert old.get_vocab().items() <= new.get_vocab().items()
    assert new.convert_tokens_to_ids(["<|end|>", "<|user|>"]) == [500, 501]
    assert (new.eos_token_id, new.chat_template) == (500, old.chat_template)
    assert new.encode("a<|user|>") == old.encode("a<|user|>")


def test_new_rows_start_from_the_old_tokens_of_the_text(base, grown):
    old, new = load_tokenizer(base), load_tokenizer(grown[1])
    for index, origin in enumerate(grown[0].origins, 502):
        assert "".join(old.convert_ids_to_tokens(origin)) == new.convert_ids_to_tokens(index)
        assert max(origin) < 500


def test_bytes_that_other_scripts_share_are_not_joined(base):
    vocabulary = ByteLevelVocabulary(base)
    spell = {bytes([byte]): letter for letter, byte in _letters().items()}

    def piece(content: bytes) -> str:
        return "".join(spell[bytes([byte])] for byte in content)

    assert vocabulary.in_script(piece("中".encode()[:2]), "han")  # U+4E00 to U+4E3F
    assert vocabulary.in_script(piece("𠀀".encode()[:2]), "han")
    assert vocabulary.in_script(piece("a中".encode()), "han")
    assert not vocabulary.in_script(piece("。".encode()[:2]), "han")  # Kana begin alike
    assert not vocabulary.in_script(piece("“".encode()[:2]), "han")
    assert not vocabulary.in_script(piece("中".encode()[1:]), "han")
    assert not vocabulary.in_script(piece(b"\xff"), "han")


def _letters():
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}


def test_a_donor_is_trained_as_the_base_cuts_text(base, jsonl, poems, tmp_path):
    asked = stage(donor={"vocabulary_size": 900, "sources": [{"path": jsonl(poems)}]})
    found = expand(asked, open_base(base), asked.donor, 502, tmp_path / "grown")
    assert found.metrics["pieces_added"] > 300
    assert found.size % 64 == 0
    asked = stage(donor={"vocabulary_size": 900, "sources": [{"path": jsonl(["春"] * 9)}]})
    with pytest.raises(DataError, match="pieces, not 900"):
        expand(asked, open_base(base), asked.donor, 502, tmp_path / "other")


def test_a_donor_that_cuts_and_fills_texts_for_its_model_counts_whole_ones(base, donor, poems, tmp_path):
    fast = Tokenizer.from_file(str(donor))
    fast.enable_truncation(8)
    fast.enable_padding(length=1000)
    fast.save(str(tmp_path / "tokenizer.json"))
    vocabulary = ByteLevelVocabulary(base)
    own, plain = (vocabulary.read_donor(path).count(poems) for path in (tmp_path / "tokenizer.json", donor))
    assert own == plain and sum(plain.values()) > 8 * len(poems)


def test_other_kinds_are_refused(base, tokenizer, donor, tmp_path):
    wordpiece = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    wordpiece.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="WordPiece"):
        expand(stage(), open_base(base), tmp_path, 502, tmp_path / "grown")
    with pytest.raises(DataError, match="BPE over characters"):  # SentencePiece's twin without its tokenizer.model
        expand(stage(), open_base(base), tokenizer / "tokenizer.json", 502, tmp_path / "grown")
    with pytest.raises(TokenizerMismatch, match="base is a byte-level BPE"):
        expand(stage(), open_base(base), tokenizer / "tokenizer.model", 502, tmp_path / "grown")
    with pytest.raises(TokenizerMismatch, match="base is a SentencePiece BPE"):
        expand(stage(), open_base(tokenizer), donor, 512, tmp_path / "grown")
    for damaged in ('{"model": ', '{"model": ' + "[" * 100_000):
        (tmp_path / "tokenizer.json").write_text(damaged)
        with pytest.raises(DataError, match="cannot be read"):
            expand(stage(), open_base(base), tmp_path, 502, tmp_path / "grown")
    assert not (tmp_path / "grown").exists()


@pytest.mark.parametrize("text", ["[1]", "null", '"BPE"'])
def test_json_that_is_no_tokenizer_is_refused(text):
    with pytest.raises(DataError, match="the donor cannot be read: it does not have the layout"):
        read_content(text, "the donor")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"vocab": {', '"vocab": {"": 1500, ', "'' .*is empty"),
        ('"vocab": {', '"vocab": {"new": 300, ', "shares id 300"),
        ('"vocab": {', '"vocab": {"!": 1500, ', "'!' twice"),
        ('"merges": [', '"merges": [["no", "piece"], ', "cannot be read"),
        ('"merges": [', '"merges": [5, ', "the merge 5 does not consist of two pieces"),
        ('"merges": [', '"merges": [[1, 2], ', r"the merge \[1, 2\] does not consist of two pieces"),
        ('"merges": [', '"merges": ["a b c", ', "the merge 'a b c' does not consist of two pieces"),
        ('"merges": [', '"merges": 5, "other": [', "its `merges` are not a list"),
        ('"merges": [', '"other": [', "its `merges` are not a list"),
        ('"vocab": {', '"vocab": ["a"], "other": {', "its `vocab` does not map every piece to an id"),
        ('"vocab": {', '"other": {', "its `vocab` does not map every piece to an id"),
        ('"vocab": {', '"vocab": {"new": [1], ', "its `vocab` does not map every piece to an id"),
        ('"model": {', '"model": "BPE", "other": {', "not have the layout of a tokenizer.json"),
    ],
)
def test_damaged_donors_are_refused(base, donor, tmp_path, before, after, message):
    content = json.dumps(json.loads(donor.read_text(encoding="utf-8")))
    (tmp_path / "tokenizer.json").write_text(content.replace(before, after, 1), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        expand(stage(), open_base(base), tmp_path / "tokenizer.json", 502, tmp_path / "grown")
    assert not (tmp_path / "grown").exists()
    if 'no", "piece' not in after:  # tokenizers itself sees that one
        with pytest.raises(DataError, match=message):
            open_base(tmp_path)  # as the base, too


def test_a_file_of_before_models_had_a_type_is_a_bpe_all_the_same(base, donor, tmp_path):
    """GPT-2's own on the Hub."""
    shutil.copytree(base, tmp_path / "base")
    for path, copy in ((base / "tokenizer.json", tmp_path / "base" / "tokenizer.json"), (donor, tmp_path / "d.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert content["model"].pop("type") == "BPE"
        copy.write_text(json.dumps(content), encoding="utf-8")
    found = expand(stage(), open_base(tmp_path / "base"), tmp_path / "d.json", 502, tmp_path / "grown")
    assert found.metrics == expand(stage(), open_base(base), donor, 502, tmp_path / "typed").metrics


def test_another_kind_of_base_is_refused_as_such_whatever_else_it_lacks(tmp_path):
    """BERT's has no end token, and to be told so would lead nowhere."""
    Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="but WordPiece"):
        open_base(tmp_path)

"""A trained tokenizer gives SentencePiece's ids through transformers, and the text back."""

import json
import shutil

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, Qwen2Tokenizer

from minima.assets import read_text_asset
from minima.data.documents import HeldOut
from minima.data.encoding import Encoder, EncodingTask
from minima.data.piece_training import train_sentencepiece
from minima.data.tokenizer import (
    check_same_tokens,
    check_vocabulary,
    count_ids,
    load_tokenizer,
    misread_as,
    save_tokenizer,
)
from minima.errors import DataError, TokenizerMismatch

ODD = ["", " a", "a  b   c", "x</s>y", "\n\n a\tb", "12345 67", "太宗皇帝", "-----", "\x00", "é\u200b 👍🏽", " ", "  "]


@pytest.fixture(scope="session")
def loaded(tokenizer):
    return load_tokenizer(tokenizer)


@pytest.fixture(scope="session")
def pieces(model):
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def test_layout_is_llamas(loaded, pieces):
    assert len(loaded) == pieces.get_piece_size() == 512
    assert loaded.convert_ids_to_tokens([0, 1, 2, 3, 258]) == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert (loaded.unk_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    assert not any("\n" in loaded.convert_ids_to_tokens(i) for i in range(259, 512))
    digits = [loaded.convert_ids_to_tokens(i) for i in range(259, 512)]
    assert not any(any(c.isdigit() for c in piece) and len(piece.strip("▁")) > 1 for piece in digits)


def test_ids_are_sentencepieces_and_text_comes_back(loaded, pieces, addresses):
    poems = [record["text"] for record, _ in zip(read_text_asset("poems"), range(200), strict=False)]
    for texts in (addresses, poems, [text for text in ODD if "</s>" not in text]):
        ids = loaded(texts)["input_ids"]
        assert ids == pieces.encode(texts)
        assert [loaded.decode(document) for document in ids] == texts


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40))
def test_any_text_comes_back(loaded, text):
    assert loaded.decode(loaded(text, split_special_tokens=True)["input_ids"]) == text


def test_the_folder_survives_transformers(loaded, tokenizer, tmp_path, addresses):
    """Exported models carry the tokenizer beside a config.json, which must not change its class or ids."""
    save_tokenizer(loaded, tokenizer, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 512}))
    again = load_tokenizer(tmp_path)
    assert again(addresses[:50])["input_ids"] == loaded(addresses[:50])["input_ids"]
    assert again.eos_token_id == 2
    assert (tmp_path / "tokenizer.model").read_bytes() == (tokenizer / "tokenizer.model").read_bytes()


def test_a_saved_tokenizer_does_not_say_how_it_was_loaded(tokenizer, tmp_path):
    """Jobs run offline and a login node does not; parts of one build would not fit together."""
    contents = []
    for offline in (True, False):
        loaded = AutoTokenizer.from_pretrained(str(tokenizer))
        loaded.init_kwargs["local_files_only"] = offline  # as transformers notes HF_HUB_OFFLINE
        save_tokenizer(loaded, tokenizer, tmp_path / str(offline))
        contents.append((tmp_path / str(offline) / "tokenizer_config.json").read_text())
    assert contents[0] == contents[1]


def test_a_lone_sentencepiece_model_gives_its_own_ids(tokenizer, pieces, tmp_path, addresses):
    (tmp_path / "tokenizer.model").write_bytes((tokenizer / "tokenizer.model").read_bytes())
    lone = load_tokenizer(tmp_path)
    assert lone(addresses[:50], add_special_tokens=False)["input_ids"] == pieces.encode(addresses[:50])
    save_tokenizer(lone, tmp_path, tmp_path / "saved")
    encoded, *_ = Encoder(tmp_path / "saved", 2, 512)(EncodingTask(addresses[:50], HeldOut(0.0, 0)))
    assert encoded.ids.tolist() == [token for ids in pieces.encode(addresses[:50]) for token in [*ids, 2]]


def test_a_text_cannot_forge_the_end_of_a_document(tokenizer, pieces):
    encoder = Encoder(tokenizer, 2, 512)
    encoded, held_out, _ = encoder(EncodingTask(ODD, HeldOut(0.0, 0)))
    assert not held_out.any()
    expected = [[*pieces.encode(text), 2] for text in ODD]
    assert encoded.ids.tolist() == [token for document in expected for token in document]
    assert encoded.lengths.tolist() == [len(document) for document in expected]
    assert encoded.sizes.tolist() == [len(text.encode()) for text in ODD]
    assert encoded.characters.tolist() == [len(text) for text in ODD]


def test_a_tokenizer_that_cuts_and_fills_texts_for_its_model_does_neither_to_documents(tokenizer, tmp_path, addresses):
    fast = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    fast.enable_truncation(8)
    fast.enable_padding(length=1000)
    fast.save(str(tmp_path / "tokenizer.json"))
    task = EncodingTask(addresses[:3], HeldOut(0.0, 0))
    own, plain = (Encoder(folder, 2, 512)(task).documents for folder in (tmp_path, tokenizer))
    assert own.ids.tolist() == plain.ids.tolist() and own.lengths.min() > 8


def test_each_document_begins_with_the_begin_token(tokenizer):
    plain, *_ = Encoder(tokenizer, 2, 512)(EncodingTask(ODD, HeldOut(0.0, 0)))
    begun, *_ = Encoder(tokenizer, 2, 512, begin_token=1)(EncodingTask(ODD, HeldOut(0.0, 0)))
    ends = plain.lengths.cumsum()
    documents = [plain.ids[end - length : end].tolist() for end, length in zip(ends, plain.lengths, strict=True)]
    assert begun.ids.tolist() == [token for document in documents for token in [1, *document]]
    assert begun.lengths.tolist() == [length + 1 for length in plain.lengths]
    assert begun.sizes.tolist() == plain.sizes.tolist(), "bytes are those of the text"


def test_a_folder_without_fast_tokenizer_encodes_the_same(tokenizer, tmp_path, monkeypatch, loaded):
    fast, *_ = Encoder(tokenizer, 2, 512)(EncodingTask(ODD, HeldOut(0.0, 0)))
    monkeypatch.setattr("minima.data.tokenizer.load_tokenizer", lambda folder: loaded)
    slow, *_ = Encoder(tmp_path, 2, 512)(EncodingTask(ODD, HeldOut(0.0, 0)))
    assert slow.ids.tolist() == fast.ids.tolist()


def test_training_is_deterministic(model, addresses):
    assert train_sentencepiece(addresses, 512) == model
    assert train_sentencepiece(addresses[::-1][:300], 512) != model


def test_long_lines_are_learnt_from():
    """SentencePiece by itself skips lines of more than 4,192 bytes."""
    line = " ".join(f"{first}{second}" for first in "abcdefghij" for second in "klmnopqrst") * 60
    assert len(line) > 4192
    assert train_sentencepiece([line], 400)
    assert train_sentencepiece(["ab" * 5000 + " cd" * 50], 270)


def test_too_little_text_is_said():
    with pytest.raises(DataError, match="could not learn 5000 pieces"):
        train_sentencepiece(["a few words only"], 5000)


def test_no_tokenizer_is_said(tmp_path):
    with pytest.raises(DataError, match="no tokenizer can be loaded"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "[1]"),
        ("tokenizer.json", "null"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"added_tokens": [], "model": "BPE"}'),
        ("tokenizer.json", '{"added_tokens": [], "model": {"type": "BPE"}}'),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
    ],
    ids=lambda text: text[:60],
)
def test_a_damaged_tokenizer_is_said(tokenizer, tmp_path, name, content):
    shutil.copytree(tokenizer, tmp_path / "damaged")
    (tmp_path / "damaged" / name).write_text(content)
    with pytest.raises(DataError, match=r"no tokenizer can be loaded from '.*damaged': \S"):
        load_tokenizer(tmp_path / "damaged")


def test_a_tokenizers_own_code_is_not_executed_whatever_standard_input_says(tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer, folder)
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own), encoding="utf-8")
    executed = tmp_path / "executed"
    (folder / "own.py").write_text(f"open({str(executed)!r}, 'w')\n", encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda _: "y")
    with pytest.raises(DataError, match="custom code"):
        load_tokenizer(folder)
    assert misread_as(folder) is None
    assert not executed.exists()


def test_a_tokenizer_without_end_token_is_refused(tokenizer, tmp_path):
    Tokenizer.from_file(str(tokenizer / "tokenizer.json")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(DataError, match="no end token"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_refused():
    check_vocabulary(512, 512, "t", "m")
    check_vocabulary(512, 576, "t", "m")  # padded rows
    with pytest.raises(TokenizerMismatch, match=r"513 ids.*512 embedding rows"):
        check_vocabulary(513, 512, "t", "m")


def test_another_tokenizer_of_the_same_size_is_told_by_its_first_other_id(tokenizer, tmp_path):
    check_same_tokens(tokenizer, tokenizer, "the model")
    shutil.copytree(tokenizer, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    first, second = (next(piece for piece, index in vocabulary.items() if index == number) for number in (400, 401))
    vocabulary[first], vocabulary[second] = 401, 400
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    with pytest.raises(TokenizerMismatch, match=r"id 400 is .+ and .+ in that of the model"):
        check_same_tokens(tokenizer, tmp_path / "other", "the model")


def test_data_with_a_token_that_the_model_does_not_know_is_told(tokenizer, tmp_path):
    more = load_tokenizer(tokenizer)
    more.add_tokens(["<new>"])
    save_tokenizer(more, tokenizer, tmp_path)
    check_same_tokens(tokenizer, tmp_path, "the model")
    with pytest.raises(TokenizerMismatch, match=r"id 512 is '<new>' in .* and None in that of"):
        check_same_tokens(tmp_path, tokenizer, "the model")


def test_ids_are_counted_by_the_highest(tokenizer, tmp_path):
    assert count_ids(tokenizer) == 512
    shutil.copytree(tokenizer, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary[next(piece for piece, index in vocabulary.items() if index == 511)] = 700
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    assert count_ids(tmp_path / "other") == 701


def test_a_models_tokenizer_that_cannot_be_told_is_no_obstacle(tokenizer, tmp_path, caplog):
    (tmp_path / "tokenizer.json").write_text("{}")
    check_same_tokens(tokenizer, tmp_path, "the model")
    assert "cannot tell" in caplog.text


def test_a_folder_tokenizes_as_its_files_say_whatever_the_family(tokenizer, tmp_path):
    """transformers 5 takes a class of its own for a qwen2, by which this tokenizer would lose every space."""
    shutil.copytree(tokenizer, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen2"}')
    text = "Let it not be 12345 recorded, that's\n\n  x=3;\tfoo 第一."
    ids = load_tokenizer(tokenizer)(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path / "model")(text)["input_ids"] != ids, "no longer needed?"
    assert load_tokenizer(tmp_path / "model")(text)["input_ids"] == ids
    assert misread_as(tmp_path / "model") == "Qwen2Tokenizer" and misread_as(tokenizer) is None


def test_a_class_that_tokenizes_alike_is_no_misreading(tmp_path):
    """A model whose own tokenizer was saved anew is declared plain, and is as right under its family's class."""
    words = {token: number for number, token in enumerate(["<unk>", "<|endoftext|>", *ByteLevel.alphabet()])}
    Qwen2Tokenizer(vocab=words, merges=[]).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "TokenizersBackend"}))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert type(AutoTokenizer.from_pretrained(tmp_path)).__name__ == "Qwen2Tokenizer"
    assert misread_as(tmp_path) is None

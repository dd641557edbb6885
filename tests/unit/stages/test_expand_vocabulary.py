"""The stage leaves a model and its tokenizer that plain transformers loads, or nothing."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minima.assets import read_text_asset
from minima.data.piece_training import train_sentencepiece
from minima.data.tokenizer import write_tokenizer
from minima.errors import DataError, DiskFull, TokenizerMismatch
from minima.launcher import Launch
from minima.models.shape import ModelShape
from minima.models.weights import FolderSource, RandomSource, write_folder
from minima.recipe.schema import Recipe
from minima.stages import expand_vocabulary
from minima.stages.context import StageContext

SHAPE = ModelShape(vocabulary_size=512, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, tied=True)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, str]:
    folder, paths = tmp_path_factory.mktemp("texts"), {}
    for name, count in (("sotu", 12), ("poems", 500)):
        records = (record["text"] for record, _ in zip(read_text_asset(name), range(count), strict=False))
        pieces = [text[i : i + 2000] for text in records for i in range(0, len(text), 2000)]
        paths[name] = str(folder / f"{name}.jsonl")
        Path(paths[name]).write_text("".join(json.dumps({"text": text}) + "\n" for text in pieces), encoding="utf-8")
    return paths


@pytest.fixture(scope="module")
def model(tmp_path_factory, texts) -> Path:
    """A model with the tokenizer that it was made with."""
    folder, source = tmp_path_factory.mktemp("model"), RandomSource(SHAPE.to_config(), seed=1)
    write_folder(folder, source.config, ((name, source.read(name)) for name in source.names()))
    lines = [json.loads(line)["text"] for line in Path(texts["sotu"]).read_text(encoding="utf-8").splitlines()]
    write_tokenizer(train_sentencepiece(lines, 512), folder)
    return folder


@pytest.fixture
def context(model, texts, tmp_path):
    def make(**settings) -> StageContext:
        poems = {"path": texts["poems"], "name": "poems"}
        stage = {
            "name": "grow", "kind": "expand_vocabulary", "model": str(model), "script": "han", "size": 768,
            "donor": {"vocabulary_size": 1000, "sources": [poems]}, "count_on": [poems], "held_out_fraction": 0.2,
            "report_on": [poems, {"path": texts["sotu"], "name": "sotu"}],
        } | settings  # fmt: skip
        recipe = Recipe.model_validate({"name": "run", "stages": [stage]})
        folder = tmp_path / "run" / "grow"
        folder.mkdir(parents=True, exist_ok=True)
        return StageContext(recipe, tmp_path / "recipe.yaml", recipe.stages[0], folder, folder.parent, Launch())

    return make


def test_what_it_leaves_is_a_model_like_any_other(context, model):
    one = context()
    metrics = expand_vocabulary.run(one)
    folder = one.folder / "model"
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == loaded.config.vocab_size == metrics["vocabulary"] == 768
    assert sum(parameter.numel() for parameter in loaded.parameters()) == metrics["parameters"]
    assert metrics["parameters"] - metrics["parameters_before"] == 256 * 16
    assert ModelShape.from_folder(folder) == SHAPE.model_copy(update={"vocabulary_size": 768})
    assert FolderSource(folder).shape("model.embed_tokens.weight") == (768, 16)
    text = "The people of the United States: 春眠不覺曉"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    old = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.tensor([AutoTokenizer.from_pretrained(model)("The people of the United States")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits[..., :512], old(ids).logits, rtol=1e-6, atol=1e-6)


def test_the_report_is_the_metrics(context):
    one = context()
    metrics = expand_vocabulary.run(one)
    assert json.loads((one.folder / "report.json").read_text(encoding="utf-8")) == metrics
    lengths = metrics["tokens_per_character"]
    assert lengths["poems"]["after"] < 0.7 * lengths["poems"]["before"]
    assert lengths["sotu"]["after"] == lengths["sotu"]["before"] < 0.6
    assert (metrics["vocabulary_before"], metrics["pieces_added"], metrics["reserved"]) == (512, 256, 0)
    assert sorted(path.name for path in one.folder.iterdir()) == ["model", "report.json"]


def test_random_weights_and_a_donor_from_a_file(context, model):
    first = context()
    expand_vocabulary.run(first)
    donor = first.folder.parent / "donor.model"
    donor.write_bytes((first.folder / "model" / "tokenizer.model").read_bytes())
    random = {"random": SHAPE.model_dump() | {"tied": False}}
    again = context(model=random, tokenizer=str(model), donor=str(donor), size=640, count_on=[])
    metrics = expand_vocabulary.run(again)
    assert (metrics["pieces_added"], metrics["donor_pieces"]) == (128, 512 - 259 + 256)
    assert FolderSource(again.folder / "model").shape("lm_head.weight") == (640, 16)


def test_a_model_without_a_tokenizer_is_refused(context, model, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((model / name).read_bytes())
    with pytest.raises(TokenizerMismatch, match="has no tokenizer"):
        expand_vocabulary.run(context(model=str(bare)))


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(context, model):
    small = {"random": SHAPE.model_dump() | {"vocabulary_size": 500}}
    with pytest.raises(TokenizerMismatch, match=r"512 ids.*500 embedding rows"):
        expand_vocabulary.run(context(model=small, tokenizer=str(model)))


def test_what_fails_leaves_nothing(context, monkeypatch):
    one = context(report_on=[{"path": "nowhere.txt"}])
    with pytest.raises(DataError, match="nowhere"):
        expand_vocabulary.run(one)
    assert not list(one.folder.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(expand_vocabulary, "write_folder", full)
    with pytest.raises(DiskFull):
        expand_vocabulary.run(context())
    assert not list(one.folder.iterdir())

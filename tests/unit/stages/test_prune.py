"""The prune stage refuses before it reads, shares micro-batches alike, and leaves nothing half-written."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from minima.batch import IGNORE_INDEX
from minima.data.packing import StoreWriter
from minima.data.store import TokenStore
from minima.errors import DiskFull, ShapeError, StageError, UnsupportedFamily
from minima.launcher import Launch
from minima.models.shape import ModelShape
from minima.models.weights import RandomSource, write_folder
from minima.recipe.schema import Recipe
from minima.stages import prune
from minima.stages.context import StageContext

SHAPE = ModelShape(vocabulary_size=19, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4)


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    monkeypatch.setattr(prune.distributed, "is_main", lambda: True)
    monkeypatch.setattr(prune.distributed, "rank", lambda: 0)
    monkeypatch.setattr(prune.distributed, "world_size", lambda: 1)


@pytest.fixture
def model(tmp_path) -> Path:
    source = RandomSource(SHAPE.to_config(), seed=1)
    write_folder(tmp_path / "model", source.config, ((name, source.read(name)) for name in source.names()))
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "tokenizer_config.json").write_text("{}")
    return tmp_path / "model"


@pytest.fixture
def store(tmp_path) -> TokenStore:
    with StoreWriter(tmp_path / "data" / "train", sequence_length=8, vocabulary_size=19, end_token=0) as writer:
        writer.append(np.arange(80) % 19, np.full(10, 8), np.full(10, 20))
        writer.finish()
        writer.publish()
    return TokenStore.open(tmp_path / "data" / "train")


def context(model: Path, **settings) -> StageContext:
    stage = {"name": "cut", "kind": "prune", "model": str(model), "target": {"intermediate_size": 8}, **settings}
    recipe = Recipe.model_validate({"name": "run", "stages": [stage]})
    folder = model.parent / "run" / stage["name"]
    folder.mkdir(parents=True, exist_ok=True)
    return StageContext(recipe, model.parent / "recipe.yaml", recipe.stages[0], folder, folder.parent, Launch())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": {"hidden_size": 32}}, "hidden_size 32"),
        ({"target": {"num_heads": 3}}, "does not divide"),
        ({"target": {"num_layers": 3}}, "num_layers 3"),
        ({"model_shape": "gpt2", "norm_compensation": "rms"}, "LayerNorm"),
    ],
)
def test_shapes_are_refused_before_data_is_looked_for(model, settings, message):
    if settings.pop("model_shape", None):
        config = json.loads((model / "config.json").read_text())
        source = RandomSource(ModelShape(**SHAPE.model_dump() | {"family": "gpt2", "tied": True}).to_config(), seed=1)
        assert config["model_type"] == "llama"
        write_folder(model, source.config, ((name, source.read(name)) for name in source.names()))
    with pytest.raises(ShapeError, match=message):
        prune.run(context(model, data="no-such-data", **settings))
    with pytest.raises(StageError, match="no-such-data"):
        prune.run(context(model, data="no-such-data"))


def test_blocks_are_not_made_longer(model, store):
    with pytest.raises(ShapeError, match="sequence_length 9"):
        prune.run(context(model, data=str(store.folder.parent), sequence_length=9))


def test_another_family_is_refused(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "olmo"}))
    with pytest.raises(UnsupportedFamily, match="olmo"):
        prune.run(context(model, score="random"))


@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_baselines_need_no_data_and_take_the_tokenizer_along(model, score):
    one = context(model, score=score)
    metrics = prune.run(one)
    loaded = AutoModelForCausalLM.from_pretrained(one.folder / "model")
    assert sum(parameter.numel() for parameter in loaded.parameters()) == metrics["parameters"]
    assert metrics["parameters"] == SHAPE.parameters - 2 * 3 * 16 * 16
    assert (one.folder / "model" / "tokenizer.json").is_file()


def test_what_measures_nothing_says_which_settings_it_does_not_use(model, caplog):
    resolved = context(model, score="random").stage.model_dump(mode="json")
    del resolved["model"]
    prune.run(context(model, **resolved))
    assert "not used" not in caplog.text, "a finished run's recipe writes its defaults out"
    prune.run(context(model, name="other", score="random", sequences=4, precision="float32"))
    assert "precision, sequences not used: its scores need no data" in caplog.text


def test_scores_are_reused_for_the_same_kind_only(model):
    first = context(model, score="random", seed=5)
    prune.run(first)
    first.folder.joinpath("manifest.json").write_text("{}")
    reuse = {"name": "again", "scores": str(first.folder), "target": {"num_heads": 2}}
    again = context(model, score="random", seed=6, **reuse)
    metrics = prune.run(again)
    assert metrics["num_heads"] == 2
    assert (again.folder / prune.SCORES).read_bytes() == (first.folder / prune.SCORES).read_bytes()
    with pytest.raises(StageError, match="kind 'random'"):
        prune.run(context(model, score="gradient", data="unread", **reuse))


def test_a_full_disk_is_named_and_leaves_no_model(model, monkeypatch):
    one = context(model, score="random")

    def full(folder, *_):
        folder.mkdir()
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(prune, "write_folder", full)
    with pytest.raises(DiskFull, match="model"):
        prune.run(one)
    assert not (one.folder / "model").exists()


def test_scores_outlive_a_model_that_could_not_be_written(model, monkeypatch):
    one = context(model, score="random", seed=5)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prune, "write_folder", full)
        with pytest.raises(DiskFull):
            prune.run(one)
    monkeypatch.setattr(prune, "random", lambda *_, **__: pytest.fail("measured again"))
    prune.run(one)
    assert (one.folder / "model" / "config.json").is_file()


def test_any_number_of_ranks_measures_the_same_micro_batches(store):
    def given(rank, world_size):
        return list(
            prune.batches(
                store,
                seed=3,
                sequences=5,
                micro_batch_sequences=2,
                sequence_length=6,
                rank=rank,
                world_size=world_size,
                device=torch.device("cpu"),
            )
        )

    alone, first, second = given(0, 1), given(0, 2), given(1, 2)
    assert len(alone) == 3
    assert len(first) == len(second) == 2  # ranks work in step
    for one, other in zip(alone, [first[0], second[0], first[1]], strict=True):
        assert torch.equal(one.input_ids_BT, other.input_ids_BT)
        assert torch.equal(one.labels_BT, other.labels_BT)
    assert alone[0].input_ids_BT.shape == (2, 6)
    valid = [int((batch.labels_BT != IGNORE_INDEX).sum()) for batch in (*alone, second[1])]
    assert valid == [10, 10, 5, 0]

"""What an align stage refuses before any engine is built."""

import pytest
import torch.distributed as dist

from minima.data.packing import StoreWriter
from minima.errors import DataError, ShapeError, VocabularyMismatch
from minima.launcher import Launch
from minima.models.shape import ModelShape
from minima.recipe.schema import Recipe
from minima.stages import align
from minima.stages.context import StageContext
from tests.pairs import VOCABULARY, write_pairs

SHAPE = ModelShape(vocabulary_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """A process group of this process; an engine must not be built in it."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    monkeypatch.setattr(align, "FrozenHost", None)
    yield
    dist.destroy_process_group()


def stage_of(**changes) -> dict:
    return {
        "name": "aligned", "kind": "align", "model": {"random": SHAPE.model_dump()}, "batch_sequences": 2,
        "micro_batch_sequences": 1, "steps": 1, "learning_rate": 1e-4, "data": "unknown", **changes,
    }  # fmt: skip


def run(tmp_path, **changes):
    stages = [stage_of(data=str(tmp_path / "data"), **changes)]
    recipe = Recipe.model_validate({"name": "pairs", "stages": stages})
    path = tmp_path / "recipe.yaml"
    (tmp_path / "data" / "tokenizer").mkdir(parents=True, exist_ok=True)
    return align.run(StageContext(recipe, path, recipe.stages[0], tmp_path / "own", tmp_path, Launch()))


def test_text_is_no_preference(tmp_path):
    for name in ("train", "held_out"):
        with StoreWriter(tmp_path / "data" / name, sequence_length=4, vocabulary_size=9, end_token=0) as writer:
            writer.finish()
            writer.publish()
    with pytest.raises(DataError, match=r"(?s)contains text.*align.*format: preferences"):
        run(tmp_path)


def test_a_reference_that_does_not_fit_is_refused(tmp_path):
    for name in ("train", "held_out"):
        write_pairs(tmp_path / "data" / name, 2)
    other = SHAPE.model_copy(update={"vocabulary_size": VOCABULARY + 3})
    with pytest.raises(VocabularyMismatch, match=r"(?s)no tokenizer and 64 vocabulary rows.* 61\n.*omit `reference`"):
        run(tmp_path, reference={"random": other.model_dump()})
    short = SHAPE.model_copy(update={"max_positions": 4})
    with pytest.raises(ShapeError, match="which has 4 positions"):
        run(tmp_path, reference={"random": short.model_dump()})


class Asked(Exception):
    """The reference is wanted; nothing after it is needed here."""


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, {"train": None}),
        ({"evaluate_every_steps": 1}, {"train": None, "held_out": None}),
        ({"evaluate_every_steps": 1, "evaluate_sequences": 3}, {"train": None, "held_out": 3}),
    ],
)
def test_no_more_held_out_blocks_are_precomputed_than_are_scored(tmp_path, monkeypatch, changes, wanted):
    def ask(folder, stores, build_host, *, limits, **named):
        raise Asked(dict(zip((store.folder.name for store in stores), limits, strict=True)))

    monkeypatch.setattr(align, "keep_references", ask)
    for name in ("train", "held_out"):
        write_pairs(tmp_path / "data" / name, 4)
    with pytest.raises(Asked) as asked:
        run(tmp_path, precompute_reference=True, **changes)
    assert asked.value.args == (wanted,)


def test_smoothing_that_would_do_nothing_is_refused():
    with pytest.raises(ValueError, match=r"label_smoothing 0.1.*'ipo'"):
        Recipe.model_validate({"name": "pairs", "stages": [stage_of(loss="ipo", label_smoothing=0.1)]})
    Recipe.model_validate({"name": "pairs", "stages": [stage_of(label_smoothing=0.1)]})


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, ("sigmoid", 0.1, 0.0, False)),
        ({"beta": 0.3, "label_smoothing": 0.2, "length_normalised": True}, ("sigmoid", 0.3, 0.2, True)),
        ({"loss": "ipo", "beta": 0.2}, ("ipo", 0.2, 0.0, True)),
        ({"loss": "ipo", "length_normalised": False}, ("ipo", 0.1, 0.0, False)),
    ],
)
def test_what_a_recipe_says_of_the_loss_is_what_is_trained_with(changes, wanted):
    recipe = Recipe.model_validate({"name": "pairs", "stages": [stage_of(chunk_tokens=77, **changes)]})
    made = align._objective(recipe.stages[0], None)
    assert (made.loss, made.beta, made.label_smoothing, made.length_normalised) == wanted
    assert made.chunk_tokens == 77

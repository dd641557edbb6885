"""What a stage refuses before it begins: damaged data, and conversations in another format than the model's."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch.distributed as dist
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from minima.data.chats.template_choice import set_template
from minima.data.packing import StoreWriter
from minima.errors import ShapeError, StoreCorrupted, TokenizerMismatch
from minima.launcher import Launch
from minima.models.shape import ModelShape
from minima.models.weights import RandomSource, write_folder
from minima.recipe.schema import Recipe
from minima.stages import align, distil, instruct, origin
from minima.stages.context import StageContext
from tests.pairs import VOCABULARY, write_pairs

SHAPE = ModelShape(vocabulary_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2)
OTHER = (
    "{% for m in messages %}{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)
STAGES = {"align": align, "distil": distil, "instruct": instruct}
MINICHAT = "minichat"


class Built(Exception):
    """All checks of the data have passed."""


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """A process group of this process; no engine is built in it."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())

    def refuse(*args, **kwargs):
        raise Built

    for module in (align, distil):
        monkeypatch.setattr(module, "FrozenHost", refuse)
    monkeypatch.setattr("minima.stages.training.Student", refuse)
    yield
    dist.destroy_process_group()


def write_tokenizer(folder, template):
    words = {word: number for number, word in enumerate(["<unk>", "</s>", *map(str, range(VOCABULARY - 2))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    loaded = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    if template is not None:
        loaded.chat_template = template
        set_template(loaded, MINICHAT if template == MINICHAT else None)
    loaded.save_pretrained(folder)


def write_model(folder, template):
    config = SHAPE.to_config()
    source = RandomSource(config, seed=0)
    write_folder(folder, config, ((name, source.read(name)) for name in source.names()))
    write_tokenizer(folder, template)
    return str(folder)


def write_data(folder, format, template):
    for name in ("train", "held_out"):
        if format == "preferences":
            write_pairs(folder / name, 2)
            continue
        shape = {"sequence_length": 4, "vocabulary_size": VOCABULARY, "end_token": 0, "format": format}
        with StoreWriter(folder / name, **shape, document_mask=format != "text") as writer:
            learnt = None if format == "text" else np.ones(4, np.uint8)
            writer.append(np.full(4, 5), np.array([4]), np.array([4]), learnt)
            writer.finish()
            writer.publish()
    write_tokenizer(folder / "tokenizer", template)
    return str(folder)


def run(tmp_path, kind, data, **changes):
    stage = {
        "name": "tuned", "kind": kind, "data": data, "batch_sequences": 1, "micro_batch_sequences": 1, "steps": 1,
        "learning_rate": 1e-4, "evaluate_every_steps": 0, "precision": "float32", **changes,
    }  # fmt: skip
    recipe = Recipe.model_validate({"name": "chat", "stages": [stage]})
    context = StageContext(recipe, tmp_path / "r.yaml", recipe.stages[0], tmp_path / "own", tmp_path, Launch())
    STAGES[kind].run(context)


def test_preferences_in_another_format_are_refused(tmp_path):
    same, other = (write_model(tmp_path / name, template) for name, template in (("same", MINICHAT), ("other", OTHER)))
    bare = write_model(tmp_path / "bare", None)
    data = write_data(tmp_path / "data", "preferences", MINICHAT)
    for changes in ({"model": other}, {"model": same, "reference": other}):
        with pytest.raises(TokenizerMismatch, match=r"(?s)not in the format of .*/other: .*\[\|User\|\].*against"):
            run(tmp_path, "align", data, **changes)
    for changes in ({"model": same}, {"model": bare, "reference": same}):
        with pytest.raises(Built):
            run(tmp_path, "align", data, **changes)


def test_tuning_may_teach_another_format(tmp_path, caplog):
    same, other = (write_model(tmp_path / name, template) for name, template in (("same", MINICHAT), ("other", OTHER)))
    data = write_data(tmp_path / "data", "conversations", MINICHAT)
    with caplog.at_level(logging.WARNING, "minima.stages"), pytest.raises(Built):
        run(tmp_path, "instruct", data, model=same)
    assert not caplog.records
    for kind, changes in (
        ("instruct", {}),
        ("distil", {"teacher": same}),
        ("distil", {"teacher": same, "soft_weight": 0}),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "minima.stages"), pytest.raises(Built):
            run(tmp_path, kind, data, model=other, **changes)
        assert "/other: " in caplog.text and "chat_template: own" in caplog.text


def test_a_teacher_of_another_format_is_refused_but_not_for_text(tmp_path, caplog):
    same, other = (write_model(tmp_path / name, template) for name, template in (("same", MINICHAT), ("other", OTHER)))
    with pytest.raises(TokenizerMismatch, match="/other: "):
        run(tmp_path, "distil", write_data(tmp_path / "chat", "conversations", MINICHAT), model=same, teacher=other)
    with pytest.raises(Built):
        run(tmp_path, "distil", write_data(tmp_path / "text", "text", MINICHAT), model=same, teacher=other)
    assert "not in the format" not in caplog.text


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("shard", ["tokens-00000.bin", "starts-00000.bin", "learnt-00000.bin"])
@pytest.mark.parametrize("kind", ["instruct", "distil"])
def test_a_damaged_shard_is_named_before_anything_is_trained(tmp_path, kind, shard, split):
    model = write_model(tmp_path / "same", MINICHAT)
    data = write_data(tmp_path / "data", "conversations", MINICHAT)
    changes = {"model": model} | ({"teacher": model} if kind == "distil" else {})
    file = tmp_path / "data" / split / shard
    whole = file.read_bytes()
    flipped = bytes([whole[0] ^ 1]) + whole[1:]
    for content, how in ((flipped, "has sha256"), (whole[:-1], f"has {len(whole) - 1} bytes"), (None, "is missing")):
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(StoreCorrupted, match=f"{split}/{shard} {how}"):
            run(tmp_path, kind, data, **changes)
        file.write_bytes(whole)
    with pytest.raises(Built):
        run(tmp_path, kind, data, **changes)


def test_the_wait_for_much_data_is_told(tmp_path, monkeypatch, caplog):
    write_data(tmp_path / "data", "conversations", MINICHAT)
    store = tmp_path / "data" / "train"
    size = sum(file.stat().st_size for file in store.glob("*.bin"))
    for limit, told in ((size, True), (size + 1, False)):
        monkeypatch.setattr(origin, "_TOLD_BYTES", limit)
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="minima"):
            origin.open_store(store)
        assert (f"{store}: reading all {size} bytes once" in caplog.text) is told


@pytest.mark.parametrize(
    ("changes", "told"), [({}, True), ({"seed": 5}, False), ({"data": "other"}, False), ({"model": "first@2"}, True)]
)
def test_going_on_over_the_same_blocks_is_told(tmp_path, caplog, changes, told):
    given = {"kind": "adapt", "data": "corpus", "batch_sequences": 2, "micro_batch_sequences": 1, "steps": 2,
             "learning_rate": 1e-3, "checkpoint_every_steps": 2}  # fmt: skip
    stages = [given | {"name": "first", "model": "base"}, given | {"name": "second", "model": "first"} | changes]
    recipe = Recipe.model_validate({"name": "x", "stages": stages})
    stage = recipe.stage("second")
    context = StageContext(recipe, tmp_path / "x.yaml", stage, tmp_path / "second", tmp_path, Launch())
    origin.warn_of_same_blocks(context, stage)
    assert ("second: reads the blocks of corpus in the same order as first" in caplog.text) is told


def test_a_shape_of_another_model_is_refused_and_one_that_says_too_little_is_told(monkeypatch, caplog):
    monkeypatch.setattr(origin, "open_weights", lambda folder, step: RandomSource(SHAPE.to_config(), seed=1))
    resolved = SimpleNamespace(folder=None, step=None, name="m", tokenizer=None)
    context = SimpleNamespace(model=lambda model: resolved)
    given = SHAPE.model_dump(exclude={"num_key_value_heads", "head_size"})
    origin.open_origin(context, origin.ModelInput(source="m", shape=given))
    assert not caplog.text
    origin.open_origin(context, origin.ModelInput(source="m", shape=given | {"tied": True}))
    assert "m: tied is False, but the recipe says True" in caplog.text
    with pytest.raises(ShapeError, match="hidden_size is 8, but the recipe says 16"):
        origin.open_origin(context, origin.ModelInput(source="m", shape=given | {"hidden_size": 16}))

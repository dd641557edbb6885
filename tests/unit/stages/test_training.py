"""What a recipe says of a training is what is trained with."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from minima.engine.schedule import Schedule
from minima.errors import DataError
from minima.launcher import Launch
from minima.models.shape import ModelShape
from minima.models.weights import MemorySource
from minima.recipe.schema import Recipe
from minima.stages import training
from minima.stages.context import StageContext

SHAPE = ModelShape(vocabulary_size=64, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2)


class Store(list):
    sequence_length, format = 16, "text"

    def sha256(self):
        return ""


@pytest.fixture(autouse=True)
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("settings", "steps", "warmup", "sequences"),
    [
        ({"steps": 39, "warmup_fraction": 0.25}, 39, 10, 234),
        ({"tokens": 16 * 27, "warmup_steps": 2}, 5, 2, 27),
        ({"epochs": 1.33, "warmup_fraction": 0.0}, 5, 0, 27),
    ],
)
def test_schedule_and_feed_are_the_recipes(tmp_path, monkeypatch, settings, steps, warmup, sequences):
    given = {"learning_rate": 3e-4, "schedule": "linear", "final_learning_rate_fraction": 0.2, "seed": 99,
             "batch_sequences": 6, "micro_batch_sequences": 2, **settings}  # fmt: skip
    stage = {"name": "a", "kind": "adapt", "model": {"random": SHAPE.model_dump()}, "data": "d", **given}
    recipe = Recipe.model_validate({"name": "x", "stages": [stage]})
    context = StageContext(recipe, tmp_path / "x.yaml", recipe.stages[0], tmp_path, tmp_path, Launch())
    seen = SimpleNamespace(feed={}, trained=[], students=[])
    device = SimpleNamespace(device=torch.device("cpu"), close=lambda: None)
    run = SimpleNamespace(
        resume=lambda: 3, start=lambda *_: None, ended=None, catch_up=lambda *_: False, watchdog=nullcontext(),
        events=lambda: None, settle=lambda: None, metrics=dict, close=lambda: None,
    )  # fmt: skip
    choice = SimpleNamespace(activation_checkpointing="none")
    for name, stand_in in {
        "open_store": lambda folder: Store(range(20)), "check_tokens": lambda *_: None, "check_fit": lambda *_: None,
        "open_origin": lambda context, model, seed: SimpleNamespace(
            source=MemorySource(SHAPE.to_config(), {}), tokenizer=None, identity=f"seed {seed}"
        ),
        "warn_of_same_blocks": lambda *_: None, "plan_memory": lambda *_: choice, "choice_metrics": lambda _: {},
        "training_config": lambda *_: {}, "copy_content": lambda *_: None,
        "Student": lambda source, config, stage: seen.students.append(stage) or device,
        "TrainingRun": lambda **given: seen.trained.append(given["facts"]["model"]) or run,
        "Feed": lambda store, **given: seen.feed.update(given),
        "StopRequest": lambda: SimpleNamespace(listen=lambda: None),  # the test's own process keeps its signals
        "train": lambda *given, **_: seen.trained.extend(given[3:6:2]),
    }.items():  # fmt: skip
        monkeypatch.setattr(training, name, stand_in)
    monkeypatch.setattr(StageContext, "data", lambda *_: tmp_path)
    monkeypatch.setattr(StageContext, "deepspeed_json", lambda *_: tmp_path)
    with pytest.raises(DataError, match=f"no folder {tmp_path}/tokenizer"):
        training.run_training(context, recipe.stages[0], lambda *_: None)
    assert not seen.students, "told before an engine is built"
    (tmp_path / "tokenizer").mkdir()
    training.run_training(context, recipe.stages[0], lambda *_: None)
    identity, schedule, first_step = seen.trained
    assert schedule == Schedule(steps, 3e-4, warmup, "linear", 0.2)
    assert identity == "seed 99" and first_step == 3
    wanted = {"seed": 99, "batch_sequences": 6, "micro_batch_sequences": 2, "total_sequences": sequences}
    assert {name: seen.feed[name] for name in wanted} == wanted
    assert seen.students[0].activation_checkpointing == "none"

"""What happens around the training loop."""

import json
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from minima.engine.patience import Patience
from minima.models.layout import MARKER, step_folder
from minima.recipe.schema import Recipe
from minima.stages.training_run import ENDED, TrainingRun, held_out_loss


@pytest.fixture(autouse=True)
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("step", "every", "recorded", "evaluated"),
    [(0, 5, [], []), (10, 5, [5], [10]), (10, 5, [5, 10], []), (7, 5, [5], []), (12, 5, [10], [12]), (10, 0, [], [])],
)
def test_an_evaluation_that_a_kill_took_is_made_up_for_once(tmp_path, step, every, recorded, evaluated):
    lines = [{"step": number, "loss": 1.0} for number in range(1, step + 1)]
    lines += [{"step": number, "held_out_loss": 2.0, "held_out_perplexity": 7.0} for number in recorded]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made: list[int] = []
    run = SimpleNamespace(
        context=SimpleNamespace(folder=tmp_path), stage=SimpleNamespace(evaluate_every_steps=every),
        evaluate=made.append, evaluated={}, patience=Patience(None),
    )  # fmt: skip
    TrainingRun.catch_up(run, step, total_steps=12)
    assert made == evaluated
    known = {"held_out_loss": 2.0, "held_out_perplexity": 7.0}
    assert run.evaluated == (known if step and every and recorded else {})


def test_a_start_after_the_end_by_patience_does_not_train_on(tmp_path):
    lines = [{"step": 20, "held_out_loss": 1.7}]  # made, and the checkpoint of its step knew those before it
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ended = {}
    for limit in (2, 3):
        run = SimpleNamespace(
            context=SimpleNamespace(folder=tmp_path), stage=SimpleNamespace(evaluate_every_steps=5),
            evaluate=None, evaluated={}, patience=Patience(limit),
        )  # fmt: skip
        run.patience.restore({"best": 1.5, "best_step": 10, "worse": 1})
        ended[limit] = TrainingRun.catch_up(run, 20, total_steps=100)
        assert run.patience.best_step == 10
    assert ended == {2: True, 3: False}


def test_checkpoints_that_the_recipe_names_are_spared(tmp_path):
    given = {"data": "data", "batch_sequences": 1, "micro_batch_sequences": 1, "steps": 6, "learning_rate": 1e-3}
    stages = [
        {"name": "a", "kind": "adapt", "model": "base", **given},
        {"name": "b", "kind": "distil", "model": "a@2", "teacher": {"source": "a@4"}, **given},
        {"name": "c", "kind": "evaluate", "models": ["b", "a@5", "b@3"], "data": "data"},
    ]
    recipe = Recipe(name="x", stages=stages)
    for name, steps in (("a", {2, 4, 5}), ("b", {3})):
        context = SimpleNamespace(folder=tmp_path, recipe=recipe)
        run = TrainingRun(
            context=context, stage=recipe.stage(name), student=None, store=None, held_out=None, shape=None,
            flops_per_token=1.0, facts={}, measure=held_out_loss, counted="valid_tokens",
        )  # fmt: skip
        assert run.writer.named == steps


@pytest.mark.parametrize(
    ("text", "steps", "kept"),
    [
        ('{"step": 80, "best_step": 40, "metrics": {"step": 40}}', [20, 40], True),
        ('{"step": 80, "best_step": 40, "metrics": {"step": 40}}', [20], False),
        ('{"step": 80, "best_step": 40, "metrics": {"step": 40}}', [], False),
        ('{"step": 80, "be', [40], False),
    ],
)
def test_the_end_of_a_run_counts_only_while_its_checkpoint_is_there(tmp_path, text, steps, kept):
    (tmp_path / ENDED).write_text(text)
    checkpoints = tmp_path / "checkpoints"
    for step in steps:
        step_folder(checkpoints, step).mkdir(parents=True)
        (step_folder(checkpoints, step) / MARKER).write_text("{}")
    run = SimpleNamespace(context=SimpleNamespace(folder=tmp_path), checkpoints=checkpoints)
    found = TrainingRun._read_end(run)
    assert found == (json.loads(text) if kept else None)
    assert (tmp_path / ENDED).exists() == kept
    run.context.folder = tmp_path / "none"
    assert TrainingRun._read_end(run) is None

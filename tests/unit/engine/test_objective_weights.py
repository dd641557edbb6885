"""Weights of the losses that follow the step: the loop tells the objective, and the log shows them."""

from types import SimpleNamespace

import pytest
import torch

from minima.engine.loop import Events, train
from minima.engine.objectives.distillation import Distillation
from minima.engine.schedule import Schedule
from minima.losses import LossSum
from minima.recipe.loss_weights import WeightSchedule

SOFT = WeightSchedule(schedule="linear", start=0.0, end=1.0)
HARD = WeightSchedule(schedule="linear", start=1.0, end=0.0)


class Seen(Distillation):
    """Says which weights each micro-batch is trained with, without a model."""

    def __init__(self, **weights):
        super().__init__(SimpleNamespace(head_VE=torch.zeros(1, 1)), **weights)
        self.seen = []

    def count(self, batch):
        return torch.tensor(1)

    def prepare(self, batches):
        self.seen.append((self.hard_weight, self.soft_weight))
        return batches

    def __call__(self, model, batch):
        return LossSum(torch.tensor(1.0), torch.tensor(1), {})


class Student:
    device = torch.device("cpu")

    def __call__(self, objective, batch):
        return objective(None, batch)

    def backward(self, loss):
        pass

    def step(self, learning_rate):
        return 1.0


def run(objective, first_step: int = 0):
    lines = {}
    nothing = lambda *_: False  # noqa: E731
    events = Events(
        log=lambda done, record: lines.update({done: record}), evaluate=nothing, save=nothing, writing=nothing,
        settle=nothing, log_every=1, evaluate_every=0, save_every=100,
    )  # fmt: skip
    schedule = Schedule(5, 1e-3, 0, "constant", 0.0)
    batches = SimpleNamespace(step=lambda step: [None, None])
    train(Student(), objective, batches, schedule, events, first_step)
    return objective.seen[::2], lines


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for place in ("loop", "meters"):
        monkeypatch.setattr(f"minima.engine.{place}.all_reduce_sum", lambda tensor: tensor)


def test_each_step_has_its_own_weights_and_a_resumed_run_the_same():
    seen, lines = run(Seen(hard_weight=HARD, soft_weight=SOFT))
    assert seen == [(1.0, 0.0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0.0, 1.0)]
    assert [(line["hard_weight"], line["soft_weight"]) for line in lines.values()] == seen
    resumed, later = run(Seen(hard_weight=HARD, soft_weight=SOFT), first_step=3)
    assert resumed == seen[3:] and later[5]["soft_weight"] == 1.0


def test_weights_that_stay_are_not_in_the_log():
    seen, lines = run(Seen(hard_weight=0.3, soft_weight=SOFT))
    assert [hard for hard, _ in seen] == [0.3] * 5
    assert "hard_weight" not in lines[1] and lines[1]["soft_weight"] == 0.0
    _, lines = run(Seen(hard_weight=0.3, soft_weight=0.7))
    assert "soft_weight" not in lines[1]

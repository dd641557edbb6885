"""Weights of the losses that follow the step: the loop tells the objective, and the log shows them."""

from types import SimpleNamespace

import pytest
import torch

from minima.batch import make_batch
from minima.engine.loop import Events, train
from minima.engine.objectives import distillation
from minima.engine.objectives.distillation import Distillation
from minima.engine.schedule import Schedule
from minima.losses import LossSum, linear_cross_entropy, linear_distillation_loss
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


OPTIONS = {"hard_weight": 0.3, "soft_weight": 0.7, "temperature": 2.0, "divergence": "skew_reverse_kl", "alpha": 0.3,
           "top_k": 9, "top_p": 0.8}  # fmt: skip


def test_the_loss_is_the_one_that_was_asked_for(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden_BTD, head_VD, teacher_BTE, head_VE = (
        torch.randn(*shape, generator=generator) for shape in ((2, 6, 8), (31, 8), (2, 6, 12), (31, 12))
    )
    batch = make_batch(torch.randint(0, 31, (2, 6), generator=generator))
    monkeypatch.setattr(distillation, "hidden_states", lambda model, batch: hidden_BTD)
    monkeypatch.setattr(distillation, "head_weight", lambda model: head_VD)
    teacher = SimpleNamespace(head_VE=head_VE, window=lambda batches: [teacher_BTE for _ in batches])
    given = hidden_BTD.flatten(0, 1), head_VD, teacher_BTE.flatten(0, 1), head_VE, batch.labels_BT.flatten()

    def loss(**options):
        objective = Distillation(teacher, **options)
        return objective(None, objective.prepare([batch])[0])

    wanted = linear_distillation_loss(*given, **OPTIONS)
    found = loss(**OPTIONS)
    assert found.total == wanted.total and found.count == wanted.count and found.parts == wanted.parts
    for name in OPTIONS:
        without = {
            key: value for key, value in OPTIONS.items() if key != name and (name, key) != ("divergence", "alpha")
        }
        assert loss(**without).total != wanted.total, name
    alone = Distillation(None, hard_weight=0.25, soft_weight=0)(None, batch)
    assert alone.total == 0.25 * alone.parts["hard"] == 0.25 * linear_cross_entropy(*given[:2], given[-1]).total

"""What a step of the loop keeps while the teacher runs."""

import gc
import weakref
from types import SimpleNamespace

import torch

from minima.batch import make_batch
from minima.engine import loop
from minima.engine.meters import Meters
from minima.engine.objectives.distillation import Distillation
from minima.losses import LossSum
from tests.unit.engine.test_objective_weights import Student


class Teacher:
    """Gives the states of a window as views of one tensor, as a sharded teacher does, and counts what is left of it."""

    head_VE = torch.zeros(1, 1)

    def __init__(self):
        self.given, self.alive = [], []

    def window(self, batches):
        gc.collect()
        self.alive.append(sum(storage() is not None for storage in self.given))
        hidden_RTE = torch.zeros(len(batches), 4, 8)
        self.given.append(weakref.ref(hidden_RTE))
        return [hidden_RTE[number : number + 1] for number in range(len(batches))]


class Objective(Distillation):
    def __call__(self, model, batch):
        assert batch.teacher_hidden_BTE is not None
        return LossSum(torch.tensor(1.0), torch.tensor(1), {})


def test_a_windows_states_are_gone_before_the_next_ones_are_made(monkeypatch):
    for place in ("loop", "meters"):
        monkeypatch.setattr(f"minima.engine.{place}.all_reduce_sum", lambda tensor: tensor)
    teacher = Teacher()
    objective = Objective(SimpleNamespace(head_VE=teacher.head_VE, window=teacher.window), window=2)
    batches = [make_batch(torch.zeros(1, 4, dtype=torch.int64)) for _ in range(6)]
    loop.train_step(Student(), objective, batches, 1e-3, Meters(torch.device("cpu")))
    assert teacher.alive == [0, 0, 0]

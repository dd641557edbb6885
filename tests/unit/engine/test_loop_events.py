"""What the loop does between steps and in which order, how a gradient is scaled, and how bad numbers end a run."""

import math
import signal
from types import SimpleNamespace

import pytest
import torch

from minima.engine.loop import Events, train
from minima.engine.schedule import Schedule
from minima.errors import NotFinite, Stopped
from minima.losses import LossSum


class Student:
    device = torch.device("cpu")

    def __init__(self, norms: dict[int, float]) -> None:
        self.norms, self.backwards, self.rates = norms, [], []

    def __call__(self, objective, batch):
        return LossSum(torch.tensor(batch[0]), torch.tensor(batch[1]), {"hard": torch.tensor(batch[0])})

    def backward(self, loss):
        self.backwards.append(loss.item())

    def step(self, learning_rate):
        self.rates.append(learning_rate)
        return self.norms.get(len(self.rates), 1.0)


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for place in ("loop", "meters"):
        monkeypatch.setattr(f"minima.engine.{place}.all_reduce_sum", lambda tensor: tensor)


class Run:
    """A run of five steps without a model; `told` is what the loop has asked for, `lines` what it has logged."""

    def __init__(self, norms=None, batches=((6.0, 3),), ends_at=None, asked=False, writing=False, **events):
        self.told, self.lines, self.student = [], {}, Student(norms or {})
        self.stop = SimpleNamespace(requested=asked, signal=signal.SIGTERM)
        self.batches, self.ends_at, self.writing = batches, ends_at, writing
        self.events = {"log_every": 2, "evaluate_every": 2, "save_every": 3} | events

    def step(self, step):
        return list(self.batches)

    def note(self, what, answer=None):
        return lambda *given: self.told.append(" ".join([what, *map(str, given)])) or answer

    def log(self, done, record):
        self.told.append(f"log {done}")
        self.lines[done] = record

    def evaluate(self, done):
        self.told.append(f"evaluate {done}")
        return done == self.ends_at

    def train(self, first_step=0):
        objective = SimpleNamespace(
            window=1, begin=lambda step, total: {}, prepare=lambda batches: batches,
            count=lambda batch: torch.tensor(batch[1]),
        )  # fmt: skip
        events = Events(
            log=self.log, evaluate=self.evaluate, save=self.note("save"), settle=self.note("settle"),
            writing=lambda: self.writing, **self.events,
        )  # fmt: skip
        schedule = Schedule(5, 1.0, 0, "linear", 0.0)
        train(self.student, objective, self, schedule, events, first_step, stop=self.stop)
        return self.told


FIRST, SECOND = ["settle"], ["settle", "log 2", "settle", "evaluate 2"]
THIRD, FOURTH = ["settle", "log 3", "save 3"], ["settle", "log 4", "settle", "evaluate 4"]
LAST = ["settle", "log 5", "save 5", "settle", "evaluate 5"]


def test_every_event_comes_when_it_is_due_and_the_last_step_has_all_of_them():
    assert Run().train() == FIRST + SECOND + THIRD + FOURTH + LAST
    assert Run().train(first_step=3) == FOURTH + LAST
    assert [word for word in Run(evaluate_every=0).train() if word.startswith("evaluate")] == []


def test_a_checkpoint_comes_before_each_evaluation_where_one_is_asked_for():
    told = Run(save_evaluated=True).train()
    assert told[1:5] == ["settle", "log 2", "save 2", "settle"] and told[5] == "evaluate 2"
    assert [word for word in told if word.startswith("save")] == ["save 2", "save 3", "save 4", "save 5"]


def test_an_evaluation_ends_the_run():
    assert Run(ends_at=2).train() == FIRST + SECOND


def test_a_checkpoint_that_is_being_written_is_left_alone_until_something_needs_it():
    assert Run(writing=True).train() == SECOND[1:] + THIRD[1:] + FOURTH[1:] + LAST[1:]


def test_a_run_that_is_asked_to_end_saves_its_step_first():
    run = Run(asked=True)
    with pytest.raises(Stopped, match="step 1 of 5"):
        run.train()
    assert run.told == ["settle", "log 1", "save 1", "settle"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_rank_says_which_signal_another_rank_got(monkeypatch, number):
    other = torch.tensor([3, 1, 0, int(number == signal.SIGINT)])
    monkeypatch.setattr("minima.engine.loop.all_reduce_sum", lambda tensor: tensor + other)
    run = Run()
    run.stop = SimpleNamespace(requested=False, signal=0)
    with pytest.raises(Stopped) as caught:
        run.train()
    assert caught.value.signal == number


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_ends_the_run_once_the_last_checkpoint_is_complete(norm):
    run = Run(norms={3: norm}, save_every=2, evaluate_every=0)
    with pytest.raises(NotFinite, match=rf"step 3: the gradient norm is {norm}; since the last log line: loss 2"):
        run.train()
    assert run.told == [*FIRST, "settle", "log 2", "save 2", "settle"]


def test_a_loss_is_divided_by_the_steps_tokens_not_by_the_micro_batchs():
    run = Run(batches=((6.0, 3), (4.0, 1)))
    run.train()
    assert run.student.backwards == [1.5, 1.0] * 5
    assert run.lines[2]["loss"] == 2.5 and run.lines[2]["tokens"] == 8 and run.lines[2]["steps"] == 2
    assert run.lines[3]["tokens"] == 4, "a line begins where the last one ended"
    assert run.student.rates[::2] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_a_step_without_any_label_changes_nothing():
    run = Run(batches=((0.0, 0),))
    run.train()
    assert run.student.backwards == [0.0] * 5 and run.lines[2]["loss"] == 0.0


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_reaches_the_gradient_of_every_rank(loss):
    run = Run(batches=((6.0, 3), (loss, 3)))
    run.train()
    assert run.student.backwards[0] == 1.0 and math.isnan(run.student.backwards[1])

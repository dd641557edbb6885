"""The one training loop. It never sees logits, knows no DeepSpeed, and divides by the global count in one place."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from minima.batch import Batch
from minima.engine.distributed import all_reduce_sum
from minima.engine.meters import Meters
from minima.engine.objectives.objective import Objective
from minima.engine.schedule import Schedule
from minima.engine.student import Student
from minima.errors import NotFinite


class Batches(Protocol):
    """Where a step's micro-batches come from."""

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of optimiser step `step` (the first is 0), on its device."""
        ...


@dataclass(frozen=True)
class Events:
    """What happens between steps; each is called on every rank with the number of finished steps.

    Attributes:
        log: at every `log_every` steps, before each checkpoint and at the end, with the steps' record.
        save: a checkpoint, at every `save_every` steps and at the end.
        evaluate: held-out loss, at every `evaluate_every` steps and at the end; 0 for never. After the checkpoint, so
            that no step is lost by it. True ends the run.
        save_evaluated: a checkpoint before each evaluation, too.
    """

    log: Callable[[int, dict[str, float]], None]
    evaluate: Callable[[int], bool]
    save: Callable[[int], None]
    log_every: int
    evaluate_every: int
    save_every: int
    save_evaluated: bool = False


def train(
    student: Student, objective: Objective, batches: Batches, schedule: Schedule, events: Events, first_step: int = 0
) -> None:
    """Train from `first_step` finished steps to the schedule's end, or to where an evaluation ends the run.

    Raises:
        NotFinite: a loss or a gradient is not finite. Its step has changed no weight and the last checkpoint stands.
    """
    meters = Meters(student.device)
    for step in range(first_step, schedule.total_steps):
        done, started = step + 1, time.perf_counter()
        learning_rate = schedule.learning_rate(step)
        norm = train_step(student, objective, batches.step(step), learning_rate, meters)
        if norm != norm or norm in (float("inf"), float("-inf")):
            raise NotFinite(
                f"step {done}: the gradient norm is {norm}; losses since the last log line: {meters.reduce()}",
                "an update with it would destroy the weights; it has not been applied, and the last checkpoint stands",
                "lower the learning rate or lengthen the warm-up, look at the step's data, and run again: the run "
                "resumes from its last checkpoint",
            )
        meters.step(norm, learning_rate, time.perf_counter() - started)
        last = done == schedule.total_steps
        evaluating = events.evaluate_every > 0 and (last or done % events.evaluate_every == 0)
        saving = last or done % events.save_every == 0 or (evaluating and events.save_evaluated)
        if saving or done % events.log_every == 0:  # sums never cross a checkpoint: a resumed run's lines are the same
            events.log(done, meters.reduce())
        if saving:
            events.save(done)
        if evaluating and events.evaluate(done):
            return


def train_step(
    student: Student, objective: Objective, micro_batches: list[Batch], learning_rate: float, meters: Meters
) -> float:
    """One optimiser step over this rank's micro-batches; returns the global gradient norm before clipping."""
    counts = torch.stack([objective.count(batch) for batch in micro_batches])
    count = all_reduce_sum(counts.sum()).clamp_min(1)
    norm = 0.0
    for window in _windows(micro_batches, objective.window):
        for batch in objective.prepare(window):
            loss = student(objective, batch)
            # A loss that is not finite on one rank must stop all of them before the update. Without asking the host, it
            # makes the gradients NaN, which the global norm shows everywhere; a finite one is multiplied by 1.
            finite = torch.where(torch.isfinite(loss.total.detach()), 1.0, float("nan"))
            student.backward(loss.total / count * finite)
            meters.add(loss)
            norm = student.step(learning_rate)
    return norm


def _windows(batches: Sequence[Batch], size: int) -> Iterator[list[Batch]]:
    for start in range(0, len(batches), size):
        yield list(batches[start : start + size])

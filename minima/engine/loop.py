"""The one training loop. It never sees logits, knows no DeepSpeed, and divides by the global count in one place."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from minima.batch import Batch
from minima.engine.distributed import all_reduce_sum
from minima.engine.meters import Meters
from minima.engine.objectives.objective import Objective
from minima.engine.schedule import Schedule
from minima.engine.signals import StopRequest
from minima.engine.student import Student
from minima.engine.watchdog import Watchdog
from minima.errors import NotFinite, Stopped


class Batches(Protocol):
    """Where a step's micro-batches come from."""

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of optimiser step `step` (the first is 0), on its device."""
        ...


@dataclass(frozen=True, kw_only=True)
class Events:
    """Callbacks between steps; each is called on every rank with the number of finished steps.

    Attributes:
        log: receives the record of the steps since the last call, every `log_every` steps, before each checkpoint and
            at the end.
        save: begins a checkpoint, every `save_every` steps, at the end, and when the run is asked to end.
        writing: whether this rank is still writing the files of the last checkpoint.
        settle: waits for the files of the last checkpoint and completes it; does nothing if none is open.
        evaluate: measures the held-out loss, every `evaluate_every` steps (0: never) and at the end, after the
            checkpoint, so that a failure costs no step. Returns True to end the run.
        save_evaluated: also write a checkpoint before each evaluation.
    """

    log: Callable[[int, dict[str, float]], None]
    evaluate: Callable[[int], bool]
    save: Callable[[int], None]
    writing: Callable[[], bool]
    settle: Callable[[], None]
    log_every: int
    evaluate_every: int
    save_every: int
    save_evaluated: bool = False


class Votes(NamedTuple):
    """One rank's votes before a step; summed over the ranks, how many voted so.

    Attributes:
        stop: 1 if this rank has been asked to end.
        writing: 1 if this rank's last checkpoint is not on disk yet.
        interrupt: 1 if SIGINT asked this rank to end; the exit code of every rank says so.
    """

    stop: int = 0
    writing: int = 0
    interrupt: int = 0


_NO_VOTES = Votes()


class StepResult(NamedTuple):
    """The result of an optimiser step, on the host.

    Attributes:
        norm: global gradient norm before clipping.
        votes: summed over all ranks.
    """

    norm: float
    votes: Votes


def train(
    student: Student,
    objective: Objective,
    batches: Batches,
    schedule: Schedule,
    events: Events,
    first_step: int = 0,
    *,
    stop: StopRequest | None = None,
    watchdog: Watchdog | None = None,
) -> None:
    """Train from `first_step` finished steps to the schedule's end, or until an evaluation ends the run.

    Args:
        stop: asks the run to end. One rank's request is enough: all ranks end after the same step.
        watchdog: is told of the loop's progress.

    Raises:
        NotFinite: a loss or a gradient is not finite. The step changed no weight; the last checkpoint is intact.
        Stopped: the run was asked to end, and a checkpoint of its last step is complete.
    """
    meters, stop, watchdog = Meters(student.device), stop or StopRequest(), watchdog or Watchdog(0)
    for step in range(first_step, schedule.total_steps):
        done, started = step + 1, time.perf_counter()
        watchdog.mark(f"step {done}: reading its blocks")
        learning_rate = schedule.learning_rate(step)
        facts = objective.begin(step, schedule.total_steps)
        votes = Votes(int(stop.requested), int(events.writing()), int(stop.signal == signal.SIGINT))
        result = train_step(student, objective, batches.step(step), learning_rate, meters, votes, watchdog.mark)
        norm, agreed = result.norm, result.votes
        watchdog.mark(f"step {done}: done")
        if norm != norm or norm in (float("inf"), float("-inf")):
            events.settle()
            losses = ", ".join(f"{name} {value:.4g}" for name, value in meters.losses().items())
            raise NotFinite(
                f"step {done}: the gradient norm is {norm}; since the last log line: {losses}",
                "such an update would destroy the weights; it was not applied, and the last checkpoint is intact",
                "check the step's data. To lower the learning rate or lengthen the warm-up, remove this stage's folder "
                "or add a stage of another name with `model: STAGE@STEP`, which starts from that checkpoint. Without a "
                "change, this stage resumes from it and reaches the same step again",
            )
        meters.step(norm, learning_rate, time.perf_counter() - started)
        if not agreed.writing:  # all ranks' files were on disk when the step began
            events.settle()
        last = done == schedule.total_steps
        evaluating = events.evaluate_every > 0 and (last or done % events.evaluate_every == 0)
        saving = last or done % events.save_every == 0 or (evaluating and events.save_evaluated) or agreed.stop
        if saving or done % events.log_every == 0:  # sums never span a checkpoint: a resumed run logs the same
            events.log(done, meters.reduce() | facts)
        if saving:
            events.save(done)
        if last or agreed.stop or evaluating:  # a long evaluation may be interrupted: no step is lost
            events.settle()
        if agreed.stop:
            others = signal.SIGINT if agreed.interrupt else signal.SIGTERM
            raise Stopped(stop.signal or others, f"step {done} of {schedule.total_steps}")
        if evaluating and events.evaluate(done):
            return


def train_step(
    student: Student,
    objective: Objective,
    micro_batches: list[Batch],
    learning_rate: float,
    meters: Meters,
    votes: Votes = _NO_VOTES,
    mark: Callable[[str], None] = lambda place: None,
) -> StepResult:
    """One optimiser step over this rank's micro-batches.

    The ranks' votes travel with the count of valid tokens, in the one small collective that a step needs anyway, and
    are read after the update: they cost no collective of their own, and no wait before the step's end.
    """
    mark("counting the step's valid tokens")
    counts = torch.stack([objective.count(batch) for batch in micro_batches])
    said = torch.tensor(votes, dtype=torch.int64, device=counts.device)
    sums = all_reduce_sum(torch.cat([counts.sum().view(1), said]))
    count, agreed = sums[0].clamp_min(1), sums[1:]
    norm, number = 0.0, 0
    for window in _windows(micro_batches, objective.window):
        mark(f"preparing {len(window)} of {len(micro_batches)} micro-batches")
        for batch in objective.prepare(window):
            number += 1
            mark(f"micro-batch {number} of {len(micro_batches)}")
            loss = student(objective, batch)
            # A non-finite loss on one rank must stop all ranks before the update. Without a host synchronisation, it
            # turns the gradients into NaN, which the global norm shows on every rank; a finite loss is multiplied by 1.
            finite = torch.where(torch.isfinite(loss.total.detach()), 1.0, float("nan"))
            student.backward(loss.total / count * finite)
            meters.add(loss)
            norm = student.step(learning_rate)  # DeepSpeed counts micro-batches; only the last call clips and updates
        del batch  # it would keep this window's teacher states while the next window's are computed
    return StepResult(norm, Votes(*agreed.tolist()))


def _windows(batches: Sequence[Batch], size: int) -> Iterator[list[Batch]]:
    for start in range(0, len(batches), size):
        yield list(batches[start : start + size])

"""A rank of `minima stage` that faults befall: `python -m tests.distributed.fault_rank JSON ARGUMENTS`.

Keys of the JSON: `step_seconds` (each step takes longer by so much), `hang` ([rank, step]: that rank stops there),
`nan_step` (the loss is not a number there), `slow_save_step` (writing that step's files takes 30 s), `clock_back_step`
(from there on the machine's clock goes backwards).
"""

import json
import sys
import time

from minima.cli import main
from minima.engine.checkpoint import shards
from minima.engine.objectives.language_modelling import LanguageModelling
from minima.launcher import read_launch
from minima.stages.feed import Feed

FAULTS = json.loads(sys.argv[1])
current_step = 0
feed_step, save_tensors, clock, objective = Feed.step, shards.save_tensors, time.time, LanguageModelling.__call__


def slower_step(self, step):
    global current_step
    current_step = step + 1
    time.sleep(FAULTS.get("step_seconds", 0))
    if FAULTS.get("hang") == [read_launch().rank, current_step]:
        time.sleep(600)
    return feed_step(self, step)


def slower_save(tensors, path):
    save_tensors(tensors, path)
    if FAULTS.get("slow_save_step") == current_step:
        time.sleep(30)


def clock_that_goes_back():
    back = FAULTS.get("clock_back_step")
    return clock() - (current_step * 3600 if back is not None and current_step >= back else 0)


def broken_loss(self, model, batch):
    loss = objective(self, model, batch)
    return loss._replace(total=loss.total * float("nan")) if FAULTS.get("nan_step") == current_step else loss


if __name__ == "__main__":
    Feed.step, shards.save_tensors, time.time, LanguageModelling.__call__ = (  # type: ignore[method-assign]
        slower_step, slower_save, clock_that_goes_back, broken_loss,
    )  # fmt: skip
    sys.exit(main(["stage", *sys.argv[2:]]))

"""Where a training stage goes on: the newest complete checkpoint whose bytes are those that were written."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

from minima.engine import distributed
from minima.engine.checkpoint.shards import load_shards
from minima.engine.checkpoint.store import set_aside
from minima.engine.student import Student
from minima.errors import CheckpointError, StoreCorrupted
from minima.models.layout import complete_steps, step_folder

logger = logging.getLogger("minima.resume")


def load_newest(student: Student, checkpoints: Path) -> dict[str, Any] | None:
    """Load the newest whole checkpoint into a student that has just been built; every rank calls it.

    A damaged one is named, set aside as `step-N.damaged`, and passed over.

    Args:
        student: gets weights, optimiser and random states.
        checkpoints: the stage's folder of checkpoints.

    Returns:
        What its marker says; None where no checkpoint was ever complete.

    Raises:
        CheckpointError: there are checkpoints, and none is whole; also where an earlier start has set them aside.
    """
    passed_over: list[str] = []
    while True:
        steps = complete_steps(checkpoints) if distributed.is_main() else []
        newest = distributed.broadcast_object(steps[-1] if steps else None)  # another node's view may be older
        if newest is None:
            break
        checkpoint = step_folder(checkpoints, newest)
        try:
            return load_shards(student, checkpoint)
        except StoreCorrupted as error:  # all ranks have met it
            passed_over.append(error.what)
            with distributed.refused_together(partial(_cannot_set_aside, checkpoint, error.what)):
                if distributed.is_main():
                    aside = set_aside(checkpoint)
                    logger.warning("%s; it is passed over and kept as %s", error.what, aside)
    if left := distributed.broadcast_object(_not_whole(checkpoints) if distributed.is_main() else []):
        raise CheckpointError(
            f"no checkpoint in {checkpoints} is whole: {'; '.join(passed_over or left)}",
            "the run would silently start again from its first step",
            f"copy an undamaged checkpoint back as {checkpoints}/step-NNNNNNNN (its step, in eight digits), or remove "
            f"{checkpoints}, and all that is left in it, to train again from the first step",
        )
    return None


def _cannot_set_aside(checkpoint: Path, damage: str, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{damage}, and {checkpoint} cannot be renamed: {error}",
        "the run would go on from the checkpoint before it, and every later start would read this one first",
        "let this user write there, or remove it by hand, and run again",
    )


def _not_whole(checkpoints: Path) -> list[str]:
    """What is left of checkpoints that were complete once; a save that was cut short never was."""
    return sorted(path.name for path in checkpoints.glob("step-*") if path.suffix != ".partial")

"""Resuming a training stage from the newest checkpoint that is complete and undamaged."""

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
    """Load the newest undamaged checkpoint into a newly built student; every rank calls it.

    A damaged one is reported, renamed to `step-N.damaged`, and skipped.

    Args:
        student: receives weights, optimiser and random states.
        checkpoints: the stage's folder of checkpoints.

    Returns:
        The content of its marker; None if no checkpoint was ever complete.

    Raises:
        CheckpointError: there are checkpoints, but none is usable, including any that an earlier start renamed.
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
        except StoreCorrupted as error:  # raised on all ranks
            passed_over.append(error.what)
            with distributed.refused_together(partial(_cannot_set_aside, checkpoint, error.what)):
                if distributed.is_main():
                    aside = set_aside(checkpoint)
                    logger.warning("%s; it is skipped and kept as %s", error.what, aside)
    if left := distributed.broadcast_object(_not_whole(checkpoints) if distributed.is_main() else []):
        raise CheckpointError(
            f"no checkpoint in {checkpoints} is usable: {'; '.join(passed_over or left)}",
            "the run would silently start again from its first step",
            f"copy an undamaged checkpoint back as {checkpoints}/step-NNNNNNNN (its step, in eight digits), or remove "
            f"{checkpoints} and everything in it to train again from the first step",
        )
    return None


def _cannot_set_aside(checkpoint: Path, damage: str, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{damage}, and {checkpoint} cannot be renamed: {error}",
        "the run would resume from the checkpoint before it, and every later start would read this one first",
        "give this user write permission there, or remove it by hand, and run again",
    )


def _not_whole(checkpoints: Path) -> list[str]:
    """Remains of checkpoints that were once complete; interrupted saves (`.partial`) do not count."""
    return sorted(path.name for path in checkpoints.glob("step-*") if path.suffix != ".partial")

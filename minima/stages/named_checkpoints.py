"""Checkpoints that a recipe names as `NAME@STEP`. No torch."""

from collections.abc import Sequence
from pathlib import Path

from minima.recipe.schema import AnyStage


def way_out(stage: AnyStage, folder: Path, there: Sequence[int]) -> str:
    """What to do about a checkpoint that a training stage has not left.

    Args:
        stage: the one that was trained.
        folder: its own.
        there: steps of the checkpoints in it.
    """
    steps = f"choose among {', '.join(map(str, there))}, or " if there else ""
    if getattr(stage, "patience", None) is not None:
        return f"{steps}take `patience` away and remove {folder} to train again: with it the best one ends as the last"
    return f"{steps}remove {folder} to train it again: the checkpoints that a recipe names are kept"

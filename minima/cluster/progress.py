"""How far a stage has come: step, loss, speed and what is left, from what its folder holds. No torch."""

from dataclasses import dataclass
from pathlib import Path

from minima.cluster.logged import last_record, newest_checkpoint
from minima.planning.arithmetic import plan_training
from minima.recipe.schema import AnyStage, AnyTraining, Recipe
from minima.stages.preview_inputs import KnownInputs


@dataclass(frozen=True)
class Progress:
    """How far a training stage has come; what is not known is None.

    Attributes:
        step: optimiser steps done, as last logged.
        steps: in all.
        tokens: trained on.
        loss: as last logged.
        tokens_per_second: as last logged.
        seconds_left: at that speed.
        checkpoint_step: of the newest complete checkpoint.
    """

    step: int | None = None
    steps: int | None = None
    tokens: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    checkpoint_step: int | None = None


def progress(recipe: Recipe, stage: AnyStage, run_folder: Path) -> Progress:
    """How far a stage is; all unknown for one that takes no steps."""
    if not isinstance(stage, AnyTraining):
        return Progress()
    folder = run_folder / stage.name
    record, marker = last_record(folder / "metrics.jsonl"), newest_checkpoint(folder) or {}
    steps = _steps(recipe, stage, run_folder)
    step, tokens, speed = record.get("step"), record.get("tokens"), record.get("tokens_per_second")
    left = None
    if steps and step and tokens and speed:
        left = max(0, steps - step) * (tokens / step) / speed
    return Progress(step, steps, tokens, record.get("loss"), speed, left, marker.get("step"))


def _steps(recipe: Recipe, stage: AnyTraining, run_folder: Path) -> int | None:
    if stage.steps is not None:
        return stage.steps
    known = KnownInputs(recipe.model_copy(update={"output": str(run_folder)}), run_folder / "recipe.yaml")
    length = known.length(stage.data)
    plan = plan_training(stage, length, known.blocks(stage.data)) if length else None
    return plan.steps if plan else None

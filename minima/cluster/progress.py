"""A stage's progress (step, loss, speed and remaining time), computed from its folder. No torch."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minima.disk import last_bytes
from minima.models.layout import MARKER, complete_steps, step_folder
from minima.planning.arithmetic import plan_training
from minima.recipe.schema import AnyStage, AnyTraining, Recipe
from minima.stages.preview.known_inputs import KnownInputs

_SHOWN = (("step", None), ("loss", None), ("tokens_per_second", None), ("tokens", 0))  # a number, or the default
_TAIL_BYTES = 65536  # of metrics.jsonl: some hundred records


@dataclass(frozen=True)
class Progress:
    """The progress of a training stage; unknown values are None."""

    step: int | None = None  # optimiser steps done, as last logged
    steps: int | None = None  # total number of steps
    tokens: int | None = None
    loss: float | None = None  # as last logged
    tokens_per_second: float | None = None  # as last logged
    seconds_left: float | None = None  # remaining time at that speed
    checkpoint_step: int | None = None  # of the newest complete checkpoint


def progress(recipe: Recipe, stage: AnyStage, run_folder: Path) -> Progress:
    """The progress of a stage; all unknown if the stage has no steps."""
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


def newest_checkpoint(stage_folder: Path) -> dict[str, Any] | None:
    """The marker of a stage's newest complete checkpoint; None if there is none."""
    checkpoints = stage_folder / "checkpoints"
    try:
        steps = complete_steps(checkpoints)
    except PermissionError:  # another user's run
        return None
    for step in reversed(steps):
        try:
            marker = json.loads((step_folder(checkpoints, step) / MARKER).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # removed or replaced in the meantime
            continue
        if isinstance(marker, dict):
            return marker
    return None


def last_record(path: Path) -> dict[str, Any]:
    """The last complete record of a training step; empty if there is none."""
    for line in reversed(last_bytes(path, _TAIL_BYTES).splitlines()):
        try:
            record = json.loads(line)
        except ValueError:  # still being written, or truncated
            continue
        if isinstance(record, dict) and all(_is_number(record.get(name, other)) for name, other in _SHOWN):
            return record
    return {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _steps(recipe: Recipe, stage: AnyTraining, run_folder: Path) -> int | None:
    if stage.steps is not None:
        return stage.steps
    known = KnownInputs(recipe.model_copy(update={"output": str(run_folder)}), run_folder / "recipe.yaml")
    length = known.length(stage.data)
    plan = plan_training(stage, length, known.blocks(stage.data)) if length else None
    return plan.steps if plan else None

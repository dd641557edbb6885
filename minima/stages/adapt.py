"""Causal language modelling: adapt a checkpoint to the data, or train from random weights."""

from typing import Any

from minima.engine.objectives.language_modelling import LanguageModelling
from minima.recipe.schema import Adapt
from minima.stages.context import StageContext
from minima.stages.training import run_training


def run(context: StageContext) -> dict[str, Any]:
    """Train the stage's model on next-token prediction; returns the stage's metrics."""
    stage = context.stage
    assert isinstance(stage, Adapt)
    return run_training(context, stage, lambda data, shape, choice: LanguageModelling())

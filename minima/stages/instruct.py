"""Instruction tuning: conversations in, a model that answers out."""

from typing import Any

from minima.engine.objectives.language_modelling import LanguageModelling
from minima.recipe.chat import Instruct
from minima.stages.context import StageContext
from minima.stages.training import run_training

RANKS = True


def run(context: StageContext) -> dict[str, Any]:
    """Train the stage's model on the assistant's text; returns the stage's metrics."""
    stage = context.stage
    assert isinstance(stage, Instruct)
    objective = LanguageModelling(stage.chunk_tokens, neftune_alpha=stage.neftune_alpha, seed=stage.seed)
    return run_training(
        context, stage, lambda data, shape: objective, formats=("conversations",), counted="learnt_tokens"
    )

"""The instruct stage: tunes a model on conversations."""

from pathlib import Path
from typing import Any

from minima.engine.objectives.language_modelling import LanguageModelling
from minima.engine.objectives.objective import Objective
from minima.models.shape import ModelShape
from minima.planning.placement import Choice
from minima.recipe.chat import Instruct
from minima.stages.context import StageContext
from minima.stages.origin import check_template
from minima.stages.training import run_training


def run(context: StageContext) -> dict[str, Any]:
    """Train the stage's model on the assistant's text; returns the stage's metrics."""
    stage = context.stage
    assert isinstance(stage, Instruct)

    def objective(data: Path, shape: ModelShape, _: Choice) -> Objective:
        check_template(context, data, stage.model, refuse=False)
        return LanguageModelling(stage.chunk_tokens, neftune_alpha=stage.neftune_alpha, seed=stage.seed)

    return run_training(context, stage, objective, counted="learnt_tokens")

"""The publish stage: pushes an exported model to the Hub, its card updated with later benchmark scores."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minima.recipe.schema import Publish
from minima.stages.context import StageContext
from minima.stages.release.hub_push import publish

logger = logging.getLogger(__name__)


def run(context: StageContext) -> dict[str, Any]:
    """Push the model; pushing the same files again makes no commit.

    Returns:
        The fields of `Pushed`: `url`, `commit`, `changed`, `private`, `files`, `removed` and `left_out`.

    Raises:
        StageError: it is not a finished export, or the Hub refuses it.
    """
    stage = context.stage
    assert isinstance(stage, Publish)
    named = any(other.name == stage.model for other in context.recipe.stages)
    folder = context.model(stage.model).folder if named else Path(stage.model).expanduser()
    pushed = publish(folder, stage.repo, private=stage.private, revision=stage.revision, message=stage.message)
    for line in pushed.lines():
        logger.info("%s", line)
    return asdict(pushed)

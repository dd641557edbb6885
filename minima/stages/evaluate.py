"""The evaluate stage: scores models in turn on the same held-out blocks, comparing each with one teacher."""

import math
from contextlib import ExitStack, closing
from typing import Any

from minima.data.store import TokenStore
from minima.disk import write_json
from minima.engine import distributed
from minima.engine.deepspeed_config import frozen_config
from minima.engine.teacher.host import FrozenHost
from minima.evaluation.held_out import evaluate
from minima.models.shape import ModelShape
from minima.models.weights import WeightSource
from minima.recipe.base import ModelInput
from minima.recipe.schema import Evaluate
from minima.report.progress import Progress
from minima.report.tables import text_table
from minima.stages.context import StageContext
from minima.stages.origin import Origin, check_fit, check_format, check_tokens, open_origin, open_store
from minima.stages.vocabularies import shared_rows

_WITHOUT = "omit `teacher` (loss and bits per byte need none), or compare models that share a tokenizer"
COLUMNS = ("parameters", "loss", "perplexity", "bits_per_byte", "kl", "top1_agreement")


def run(context: StageContext) -> dict[str, Any]:
    """Score every model of the stage; every rank calls it.

    Returns:
        For each model, by its name in the recipe: `parameters`, `loss` (nats per predicted token), `perplexity`,
        `bits_per_byte`, `tokens` and, with a teacher, `kl` and `top1_agreement`.

    Raises:
        StageError: a model or the data is missing.
        VocabularyMismatch: a model and the teacher have different vocabularies.
    """
    stage = context.stage
    assert isinstance(stage, Evaluate)
    store = open_store(context.data(stage.data) / "held_out")
    check_format(store, stage.kind)
    scores: dict[str, Any] = {}
    progress = Progress(stage.name, len(stage.models))
    with ExitStack() as whole:
        teacher = None
        if stage.teacher is not None:
            teacher = _build(context, stage, stage.teacher, store)
            whole.enter_context(closing(teacher[1]))
        for name in stage.models:
            with ExitStack() as own:  # each model is closed before the next one is built
                if teacher is not None and name == stage.teacher:
                    model, host = teacher
                else:
                    model, host = _build(context, stage, name, store)
                    own.enter_context(closing(host))
                held_out = evaluate(
                    host,
                    store,
                    sequences=stage.sequences,
                    micro_batch_sequences=stage.micro_batch_sequences,
                    teacher=None if teacher is None else teacher[1],
                    shared_rows=None if teacher is None else shared_rows(model, teacher[0], _WITHOUT),
                    name=name,
                )
            scores[name] = {"parameters": count_parameters(model.source)} | held_out.as_dict()
            if distributed.is_main():
                progress.note(f"{name}: held-out loss {held_out.loss:.4f} nats per token")
    if distributed.is_main():
        write_json(context.folder / "evaluation.json", {"data": str(store.folder), "models": scores})
        progress.note(f"on {store.folder}\n{table(scores)}")
    return scores


def table(scores: dict[str, dict[str, Any]]) -> str:
    """The scores as a text table, one line for each model."""
    rows = [(name, *(score.get(column) for column in COLUMNS)) for name, score in scores.items()]
    return text_table(rows, ("model", *COLUMNS))


def count_parameters(source: WeightSource) -> int:
    """The number of a model's parameters; a tied head counts once."""
    return sum(math.prod(source.shape(name)) for name in source.names())


def _build(context: StageContext, stage: Evaluate, name: str, store: TokenStore) -> tuple[Origin, FrozenHost]:
    model = open_origin(context, ModelInput(source=name))
    check_tokens(context.data(stage.data), model.tokenizer, name)
    check_fit(ModelShape.from_config(model.source.config), store, name)
    config = frozen_config(
        context.deepspeed_json(stage.deepspeed),
        precision=stage.precision,
        micro_batch_sequences=stage.micro_batch_sequences,
    )
    return model, FrozenHost(model.source, config, precision=stage.precision)

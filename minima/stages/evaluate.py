"""The evaluate stage: models one after another on the same held-out blocks, each compared with one teacher."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from minima.data.store import TokenStore
from minima.engine import distributed
from minima.engine.deepspeed_config import frozen_config
from minima.engine.teacher.host import FrozenHost
from minima.engine.weights import open_weights
from minima.evaluation.held_out import evaluate
from minima.models.shape import ModelShape
from minima.models.weights import WeightSource
from minima.recipe.schema import Evaluate
from minima.report.progress import Progress
from minima.report.tables import text_table
from minima.stages.context import StageContext
from minima.stages.manifest import write_json
from minima.stages.origin import LEARNABLE, check_fit, check_format, check_tokens, open_store

RANKS = True
COLUMNS = ("parameters", "loss", "perplexity", "bits_per_byte", "kl", "top1_agreement")


def run(context: StageContext) -> dict[str, Any]:
    """Score every model of the stage; every rank calls it.

    Returns:
        For each model, by the name that the recipe gives it: `parameters`, `loss` (nats per predicted token),
        `perplexity`, `bits_per_byte`, `tokens` and, with a teacher, `kl` and `top1_agreement`.

    Raises:
        StageError: a model or the data is not there.
        VocabularyMismatch: a model and the teacher have vocabularies of different sizes.
    """
    stage = context.stage
    assert isinstance(stage, Evaluate)
    store = open_store(context.data(stage.data) / "held_out")
    check_format(store, stage.kind, LEARNABLE)
    scores: dict[str, Any] = {}
    progress = Progress(stage.name, len(stage.models))
    with _teacher(context, stage, store) as teacher:
        for name in stage.models:
            with _host(context, stage, name, teacher, store) as (source, host):
                held_out = evaluate(
                    host,
                    store,
                    sequences=stage.sequences,
                    micro_batch_sequences=stage.micro_batch_sequences,
                    teacher=teacher,
                    name=name,
                )
            scores[name] = {"parameters": count_parameters(source)} | held_out.as_dict()
            if distributed.is_main():
                progress.note(f"{name}: held-out loss {held_out.loss:.4f} nats a token")
    if distributed.is_main():
        write_json(context.folder / "evaluation.json", {"data": str(store.folder), "models": scores})
        progress.note(f"on {store.folder}\n{table(scores)}")
    return scores


def table(scores: dict[str, dict[str, Any]]) -> str:
    """The models and their scores as text, one line for each."""
    rows = [(name, *(score.get(column) for column in COLUMNS)) for name, score in scores.items()]
    return text_table(rows, ("model", *COLUMNS))


def count_parameters(source: WeightSource) -> int:
    """Parameters of a model; a tied head counts once."""
    return sum(math.prod(source.shape(name)) for name in source.names())


def _build(context: StageContext, stage: Evaluate, name: str, store: TokenStore) -> tuple[WeightSource, FrozenHost]:
    model = context.model(name)
    check_tokens(context.data(stage.data), model.tokenizer, name)
    source = open_weights(model.folder, model.step)
    check_fit(ModelShape.from_config(source.config), store, name)
    config = frozen_config(
        context.deepspeed_json(stage.deepspeed),
        precision=stage.precision,
        micro_batch_sequences=stage.micro_batch_sequences,
    )
    return source, FrozenHost(source, config, precision=stage.precision)


@contextmanager
def _teacher(context: StageContext, stage: Evaluate, store: TokenStore) -> Iterator[FrozenHost | None]:
    """The one teacher of the whole stage, closed at its end."""
    host = None if stage.teacher is None else _build(context, stage, stage.teacher, store)[1]
    try:
        yield host
    finally:
        if host is not None:
            host.close()


@contextmanager
def _host(
    context: StageContext, stage: Evaluate, name: str, teacher: FrozenHost | None, store: TokenStore
) -> Iterator[tuple[WeightSource, FrozenHost]]:
    """One model, closed before the next is built; the teacher is not built twice."""
    if teacher is not None and name == stage.teacher:
        model = context.model(name)
        yield open_weights(model.folder, model.step), teacher
        return
    source, host = _build(context, stage, name, store)
    try:
        yield source, host
    finally:
        host.close()

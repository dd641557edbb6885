"""Assembles a training run from data, student, objective and loop; training stages differ in data and objective."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minima.data.store import TokenStore
from minima.disk import copy_content
from minima.engine import distributed
from minima.engine.deepspeed_config import training_config
from minima.engine.determinism import fix_bits
from minima.engine.loop import train
from minima.engine.objectives.objective import Objective
from minima.engine.schedule import Schedule
from minima.engine.signals import StopRequest
from minima.engine.student import Student
from minima.errors import DataError, RecipeError
from minima.models.shape import ModelShape
from minima.planning.placement import Choice
from minima.recipe.schema import AnyTraining
from minima.stages.context import StageContext
from minima.stages.feed import Feed
from minima.stages.memory_plan import choice_metrics, plan_memory
from minima.stages.origin import (
    Origin,
    check_fit,
    check_format,
    check_has_tokenizer,
    check_tokens,
    open_origin,
    open_store,
    warn_of_same_blocks,
)
from minima.stages.training_run import Measure, TrainingRun, held_out_loss


def run_training(
    context: StageContext,
    stage: AnyTraining,
    make_objective: Callable[[Path, ModelShape, Choice], Objective],
    identities: dict[str, Any] | None = None,
    *,
    measure: Measure = held_out_loss,
    counted: str = "valid_tokens",
    teacher_shape: ModelShape | None = None,
    origin: Origin | None = None,
) -> dict[str, Any]:
    """Train a stage's model, or resume from its newest checkpoint.

    Args:
        make_objective: builds the objective from the data stage's folder, the student's shape and the memory plan; a
            teacher's engine is built in it, before the student's.
        identities: facts about frozen models to record in checkpoints.
        measure: returns at least `held_out_loss`; every rank calls it.
        counted: the metrics' name for what the objective's `count` counts.
        teacher_shape: of the frozen model that runs beside the student, if any.
        origin: the weights to start from; None for those that the stage names.

    Returns:
        The stage's metrics.
    """
    data = context.data(stage.data)
    store, held_out = open_store(data / "train"), open_store(data / "held_out")
    check_format(store, stage.kind)
    origin = origin or open_origin(context, stage.model, stage.seed)
    shape = ModelShape.from_config(origin.source.config)
    check_has_tokenizer(data)
    check_tokens(data, origin.tokenizer, origin.identity)
    total_steps = _checked_steps(stage, shape, store, held_out, origin)
    if distributed.is_main():
        warn_of_same_blocks(context, stage)
    _seed(stage)
    choice = plan_memory(context, stage, shape, store.sequence_length, teacher_shape)
    stage = stage.model_copy(update={"activation_checkpointing": choice.activation_checkpointing})
    config = training_config(context.deepspeed_json(stage.deepspeed), stage, distributed.world_size(), shape)
    objective = make_objective(data, shape, choice)
    student = Student(origin.source, config, stage)
    length = store.sequence_length
    frozen_flops = 0.0 if teacher_shape is None else teacher_shape.forward_flops_per_token(length)
    run = TrainingRun(
        context=context,
        stage=stage,
        student=student,
        store=store,
        held_out=held_out,
        shape=shape,
        flops_per_token=shape.training_flops_per_token(length) + frozen_flops,
        facts={"model": origin.identity, "data": store.sha256(), **(identities or {})},
        measure=measure,
        counted=counted,
    )
    first_step = run.resume()
    batches = Feed(
        store,
        seed=stage.seed,
        batch_sequences=stage.batch_sequences,
        micro_batch_sequences=stage.micro_batch_on(distributed.world_size()),
        total_sequences=stage.total_sequences(store.sequence_length, len(store)),
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        device=student.device,
    )
    warmup, end = stage.warmup(total_steps), stage.final_learning_rate_fraction
    schedule = Schedule(total_steps, stage.learning_rate, warmup, stage.schedule, end)
    if distributed.is_main():
        copy_content(data / "tokenizer", context.folder / "tokenizer")
    try:
        run.start(first_step, total_steps)
        ended = run.ended is not None or run.catch_up(first_step, total_steps)
        distributed.barrier()  # opening logs may take rank 0 longer than the timeout of DeepSpeed's collectives
        if not ended:
            with run.watchdog:
                stop = StopRequest().listen()  # before this, a signal ends the process at once, and nothing is lost
                train(student, objective, batches, schedule, run.events(), first_step, stop=stop, watchdog=run.watchdog)
        run.settle()
        return run.metrics() | choice_metrics(choice)
    finally:
        run.close()
        student.close()


def _checked_steps(
    stage: AnyTraining, shape: ModelShape, store: TokenStore, held_out: TokenStore, origin: Origin
) -> int:
    """Check that the model fits its data, and return the stage's number of optimiser steps.

    Raises:
        MinimaError: it does not fit, there is nothing to evaluate on, or less than one sequence to train on.
    """
    check_fit(shape, store, origin.identity)
    if stage.evaluate_every_steps and len(held_out):
        check_fit(shape, held_out, origin.identity)
    elif stage.evaluate_every_steps:
        raise DataError(
            f"stage {stage.name!r} evaluates every {stage.evaluate_every_steps} steps, but {held_out.folder} is empty",
            "there is no text left that it was not trained on",
            "raise held_out_fraction of the build_data stage, or set evaluate_every_steps: 0",
        )
    if not (steps := stage.total_steps(store.sequence_length, len(store))):
        raise RecipeError(
            f"stage {stage.name!r} has less than one sequence to train on",
            "it would make no step",
            f"give it at least {store.sequence_length} tokens",
        )
    return steps


def _seed(stage: AnyTraining) -> None:
    if stage.deterministic:
        fix_bits()
    random.seed(stage.seed)
    np.random.seed(stage.seed % 2**32)
    torch.manual_seed(stage.seed)

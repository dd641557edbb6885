"""Distillation: a student learns from text and from a frozen teacher."""

from pathlib import Path
from typing import Any

from minima.data.store import TokenStore
from minima.engine.deepspeed_config import frozen_config
from minima.engine.objectives.distillation import Distillation
from minima.engine.objectives.objective import Objective
from minima.engine.teacher.host import FrozenHost
from minima.losses.linear_distillation import check_vocabularies
from minima.models.shape import ModelShape
from minima.recipe.schema import Distil
from minima.stages.context import StageContext
from minima.stages.origin import check_fit, check_template, check_tokens, open_origin
from minima.stages.training import run_training

RANKS = True


def run(context: StageContext) -> dict[str, Any]:
    """Train the stage's student; returns the stage's metrics."""
    stage = context.stage
    assert isinstance(stage, Distil)
    if not stage.soft_weight:  # the teacher would run for nothing

        def alone(data: Path, student: ModelShape) -> Objective:
            check_template(context, data, stage.model, refuse=False)
            return Distillation(None, hard_weight=stage.hard_weight, soft_weight=0, chunk_tokens=stage.chunk_tokens)

        return run_training(context, stage, alone)
    teacher = open_origin(context, stage.teacher, stage.seed)
    shape = ModelShape.from_config(teacher.source.config)
    hosts: list[FrozenHost] = []

    def objective(data: Path, student: ModelShape) -> Objective:
        check_vocabularies(student.vocabulary_size, shape.vocabulary_size)
        check_fit(shape, TokenStore.open(data / "train"), teacher.identity)
        check_tokens(data, teacher.tokenizer, teacher.identity)
        check_template(context, data, stage.teacher, refuse=True)
        check_template(context, data, stage.model, refuse=False)  # it may be taught the teacher's format
        precision = stage.teacher.precision or stage.precision
        config = frozen_config(
            context.deepspeed_json(stage.teacher.deepspeed or "teacher_zero3.json"),
            precision=precision,
            micro_batch_sequences=stage.micro_batch_sequences,
        )
        hosts.append(FrozenHost(teacher.source, config, precision=precision))
        return Distillation(
            hosts[0],
            hard_weight=stage.hard_weight,
            soft_weight=stage.soft_weight,
            temperature=stage.temperature,
            chunk_tokens=stage.chunk_tokens,
            **stage.soft_options(),
        )

    try:
        return run_training(context, stage, objective, shape.forward_flops_per_token, {"teacher": teacher.identity})
    finally:
        for host in hosts:
            host.close()

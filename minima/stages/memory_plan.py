"""Resolves `auto` settings and checks a stage's memory need on the actual machine, before anything is built."""

import logging
from typing import Any

import torch

from minima.engine import distributed
from minima.engine.deepspeed_config import read_deepspeed_json
from minima.models.shape import ModelShape
from minima.planning.candidates import Devices, trained_stage
from minima.planning.memory import Work, scored_memory
from minima.planning.placement import Choice, choose, render
from minima.planning.sharding import Sharding, read_sharding
from minima.planning.units import size_text
from minima.recipe.schema import AnyTraining, Prune
from minima.stages.context import StageContext
from minima.stages.host_memory import host_memory_bytes
from minima.stages.machine_errors import IMPORTANCE_IN_LESS

logger = logging.getLogger(__name__)


def these_devices() -> Devices:
    """The devices of this process group, described by its smallest node; every rank calls it and gets the same."""
    nodes = distributed.node_ranks()
    mine = next(len(ranks) for ranks in nodes if distributed.rank() in ranks)
    device, host = distributed.device(), host_memory_bytes()
    on_cpu = device.type == "cpu"
    memory = host // mine if on_cpu else torch.cuda.get_device_properties(device).total_memory
    facts = distributed.gather_objects((memory, host))
    return Devices(
        ranks=distributed.world_size(),
        ranks_per_node=min(map(len, nodes)),
        device_bytes=min(memory for memory, _ in facts),
        host_bytes=min(host for _, host in facts),
        host_is_device=on_cpu,
    )


def plan_memory(
    context: StageContext,
    stage: AnyTraining,
    student: ModelShape,
    sequence_length: int,
    teacher_shape: ModelShape | None,
) -> Choice:
    """Choose the frozen model's placement and what the student recomputes; rank 0 logs it if there was a choice.

    Args:
        teacher_shape: of the frozen model, if one runs beside the student.

    Raises:
        RecipeError: `auto` finds nothing that fits.
    """

    def sharding(name: str) -> Sharding:
        return read_sharding(context.deepspeed_json(name))

    choice = choose(trained_stage(stage, student, teacher_shape, sequence_length, sharding), these_devices())
    if distributed.is_main():
        if choice.warning:
            logger.warning("%s: %s", stage.name, choice.warning)
        if choice.placement is not None or stage.activation_checkpointing == "auto":
            logger.info("%s: %s", stage.name, render(choice))
    return choice


def log_scoring(context: StageContext, stage: Prune, shape: ModelShape, sequence_length: int) -> None:
    """Log the memory that measuring importance takes on each rank, with a warning if it does not seem to fit.

    Every rank calls it; rank 0 logs.
    """
    devices = these_devices()
    if not distributed.is_main():
        return
    sharding = Sharding.from_json(read_deepspeed_json(context.deepspeed_json(stage.deepspeed)))
    work = Work(stage.micro_batch_sequences, sequence_length)
    memory = scored_memory(shape, stage.precision, work, devices.ranks, sharding)
    weights = memory.resident_bytes + (memory.host_bytes if devices.host_is_device else 0)
    needed, usable = weights + memory.passing_bytes, devices.usable_bytes
    assert usable is not None
    parts = [
        f"{name} {size_text(size)}" for name, size in ({"weights": weights} | dict(memory.passing)).items() if size
    ]
    logger.info(
        "%s: importance takes %s of the %s usable on each rank's device: %s",
        stage.name, size_text(needed), size_text(usable), ", ".join(parts),
    )  # fmt: skip
    if needed > usable:
        logger.warning("%s: importance may not fit; %s", stage.name, IMPORTANCE_IN_LESS)


def choice_metrics(choice: Choice) -> dict[str, Any]:
    """The choice as entries for the stage's metrics."""
    taken: dict[str, Any] = {"activation_checkpointing": choice.activation_checkpointing}
    if choice.placement is not None:
        taken |= {
            "teacher_placement": choice.placement,
            "teacher_offload": choice.offload,
            "teacher_window_micro_batches": choice.window_micro_batches,
        }
    return taken

"""Scenarios of checkpoints: a run that goes on, on as many ranks and on fewer, and the weights that are stored."""

from pathlib import Path
from typing import Any

import deepspeed

from minima.engine import distributed
from minima.engine.checkpoint.shards import CheckpointSource, load_shards, shapes, snapshot_shards
from minima.engine.objectives.distillation import Distillation
from minima.engine.objectives.language_modelling import LanguageModelling
from minima.models.layout import step_folder
from minima.models.weights import tensor_sha256
from tests.checkpoints import write_checkpoint
from tests.distributed.scenarios import new_student, run_training, teacher_host, weight_hashes
from tests.distributed.tiny import training


def resume(folder: Path) -> Any:
    """Train six steps; then again three, and three more from the checkpoint in another engine."""
    found = {}
    for precision in ("float32", "bfloat16"):
        settings = training(precision=precision)
        host = teacher_host(precision)
        whole = new_student(settings)
        found[precision] = {"whole": run_training(settings, Distillation(host), whole)}
        found[precision]["whole_weights"] = weight_hashes(whole)

        first = new_student(settings)

        def save(step: int, student=first, target=folder / precision) -> None:
            facts = {
                "step": step, "optimizer_steps": step, "ranks": distributed.world_size(), "config": student.config,
                "shapes": shapes(student),
            }  # fmt: skip
            if step == 3:
                write_checkpoint(target, step, snapshot_shards(student), facts, keep=0)

        run_training(settings, Distillation(host), first, save=save)
        second = new_student(settings)
        facts = load_shards(second, step_folder(folder / precision, 3))
        found[precision]["resumed"] = run_training(settings, Distillation(host), second, first_step=facts["step"])
        found[precision]["resumed_weights"] = weight_hashes(second)
        for engine in (whole, first, second, host):
            engine.close()
    return found


def load_elsewhere(folder: Path) -> Any:
    """Go on from the checkpoint that another number of ranks wrote."""
    settings = training()
    student, host = new_student(settings), teacher_host()
    facts = load_shards(student, step_folder(folder / "float32", 3))
    return run_training(settings, Distillation(host), student, first_step=facts["step"])


def checkpoint_weights(folder: Path) -> Any:
    """Hashes of the whole tensors that a checkpoint gives, and of those that the student holds."""
    settings = training()
    student = new_student(settings)
    run_training(settings, LanguageModelling(), student)
    facts = {
        "step": 6, "optimizer_steps": 6, "ranks": distributed.world_size(), "config": student.config,
        "shapes": shapes(student),
    }  # fmt: skip
    path = write_checkpoint(folder / "weights", 6, snapshot_shards(student), facts, keep=0)
    held = {}
    for name, parameter in student.model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            held[name] = tensor_sha256(parameter)
    source = CheckpointSource(path)
    return {"held": held, "stored": {name: tensor_sha256(source.read(name)) for name in source.names()}}

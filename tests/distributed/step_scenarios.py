"""Scenarios of how a step is computed: recomputation, compiled layers, an optimiser on the host."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.multiprocessing.reductions import StorageWeakRef

from minima.batch import Batch
from minima.engine import distributed
from minima.engine import student as student_module
from minima.engine.checkpoint.shards import load_shards, shapes, snapshot_shards
from minima.engine.deepspeed_config import frozen_config, training_config
from minima.engine.layers import prepare_layers
from minima.engine.objectives.distillation import Distillation
from minima.engine.student import Student
from minima.engine.teacher.host import FrozenHost
from minima.models.compiling import decoder_layers
from minima.models.layout import step_folder
from tests.checkpoints import write_checkpoint
from tests.distributed.scenarios import CONFIGS, new_feed, run_training, teacher_host, weight_hashes
from tests.distributed.tiny import student_source, teacher_source, training

# Partitions and decomposes as `inductor` does, and then calls PyTorch's kernels instead of compiling its own.
CHEAP = "aot_eager_decomp_partition"


@contextmanager
def student_backend(backend: str) -> Iterator[None]:
    """Students that are built inside compile with another backend."""
    student_module.prepare_layers = functools.partial(prepare_layers, backend=backend)
    try:
        yield
    finally:
        student_module.prepare_layers = prepare_layers


def nothing_stays(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration, in which these small weights are gathered and let go of like large ones."""
    small = dict.fromkeys(
        ("stage3_param_persistence_threshold", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size"), 0
    )
    zero = config["zero_optimization"] | small
    return config | {"zero_optimization": zero}


def new_host(precision: str = "float32", **layers: Any) -> FrozenHost:
    config = nothing_stays(frozen_config(CONFIGS / "teacher_zero3.json", precision=precision))
    prepare = functools.partial(prepare_layers, **layers)
    return FrozenHost(teacher_source(), config, precision=precision, layers=prepare)


def run_once(host: FrozenHost, **changes: Any) -> dict[str, Any]:
    """Three steps of packed distillation, a held-out pass, and which gathered weights outlive a forward pass."""
    settings = training(steps=3, **changes)
    config = nothing_stays(training_config(CONFIGS / "student_zero3.json", settings, distributed.world_size()))
    student, feed = Student(student_source(), config, settings), new_feed(settings, packed=True)
    objective = Distillation(host, hard_weight=0.3, soft_weight=0.7, temperature=2.0, chunk_tokens=5)
    found: dict[str, Any] = {"records": run_training(settings, objective, student, feed=feed)}
    found["weights"] = weight_hashes(student)
    batch = feed.step(0)[0]
    with student.measured() as view:
        found["held_out"] = view.hidden_states(batch).float().square().sum().item()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found["outlive"] = _outliving(student, objective, batch)
    calls = {event.key: event.count for event in profile.key_averages()}
    found["stock_products"] = calls.get("aten::mm", 0)
    student.close()
    return found


def _outliving(student: Student, objective: Distillation, batch: Batch) -> int:
    """Gathered matrices of the layers that somebody still holds when the forward pass is over."""
    gathered: list[StorageWeakRef] = []

    def watch(layer: torch.nn.Module, _inputs: Any) -> None:
        matrices = [parameter for parameter in layer.parameters() if parameter.dim() == 2 and parameter.numel()]
        gathered.extend(StorageWeakRef(parameter.untyped_storage()) for parameter in matrices)

    leaves = [module for module in student.model.modules() if not list(module.children())]
    handles = [module.register_forward_pre_hook(watch) for module in leaves + decoder_layers(student.model)]
    loss = student(objective, objective.prepare([batch])[0])
    for handle in handles:
        handle.remove()
    outlive = sum(not reference.expired() for reference in gathered)
    assert len(gathered) >= 14, "two layers of seven matrices"
    student.backward(loss.total / 10)
    student.step(1e-3)
    return outlive


def recomputation(folder: Path) -> Any:
    """The same steps with nothing, cheap parts, and whole layers recomputed."""
    found = {}
    for precision in ("bfloat16", "float32"):
        host = new_host(precision)
        for what in ("none", "selective", "full"):
            run = run_once(host, precision=precision, activation_checkpointing=what)
            found[f"{what}-{precision}"] = run
        host.close()
    return found


def compiled(folder: Path) -> Any:
    """The same steps with student and teacher compiled, under each kind of recomputation."""
    host = new_host()
    found: dict[str, Any] = {"eager": run_once(host)}
    host.close()
    counters.clear()
    host = new_host(compiled=True, backend=CHEAP)
    with student_backend(CHEAP):
        for what in ("none", "selective", "full"):
            before = counters["stats"]["unique_graphs"]
            found[what] = run_once(host, compile=True, activation_checkpointing=what)
            found[what]["graphs"] = counters["stats"]["unique_graphs"] - before
    host.close()
    found["graph_breaks"] = sum(counters["graph_break"].values())
    return found


def offloaded_optimizer(folder: Path) -> Any:
    """Distillation with the optimiser on the host, and resumed there; with PyTorch's fused Adam, as everywhere."""
    settings, host = training(steps=4, precision="bfloat16"), teacher_host("bfloat16")
    found: dict[str, Any] = {}
    for kind in ("plain", "offloaded"):
        name = "student_zero3.json" if kind == "plain" else "student_zero3_offload.json"
        config = training_config(CONFIGS / name, settings, distributed.world_size())
        students = [Student(student_source(), config, settings) for _ in range(1 if kind == "plain" else 2)]

        def save(step: int, student=students[0], target=folder / kind) -> None:
            facts = {
                "step": step, "optimizer_steps": step, "ranks": distributed.world_size(), "config": student.config,
                "shapes": shapes(student),
            }  # fmt: skip
            if step == 3:
                write_checkpoint(target, step, snapshot_shards(student), facts, keep=0)

        found[kind] = {"records": run_training(settings, Distillation(host), students[0], save=save)}
        found[kind]["weights"] = weight_hashes(students[0])
        if kind != "plain":
            load_shards(students[1], step_folder(folder / kind, 3))
            found[kind]["resumed"] = run_training(settings, Distillation(host), students[1], first_step=3)
            found[kind]["resumed_weights"] = weight_hashes(students[1])
            optimizer = students[0].engine.optimizer
            found[kind]["fused"] = bool(optimizer.optimizer.defaults["fused"])
            found[kind]["offload"] = bool(optimizer.offload_optimizer)
        for student in students:
            student.close()
    host.close()
    return found

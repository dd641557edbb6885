"""Memory, traffic and time of one stage on any kind of GPU, computed from shapes. No torch."""

from collections.abc import Mapping
from dataclasses import replace

from minima.errors import RecipeError
from minima.planning.arithmetic import executed_flops_per_token
from minima.planning.candidates import Checkpointing, Devices, Row, TrainedStage, candidates
from minima.planning.memory import Memory
from minima.planning.placement import choose
from minima.planning.run_plan import Placed, PlannedGpus, StagePlan, cost_of
from minima.planning.throughput import StepTime, step_time, unknown_rates
from minima.planning.traffic import Traffic, frozen_traffic, trained_traffic
from minima.recipe.chat import Align

# A layer's forward and backward pass runs about a hundred kernels, and each launch takes some microseconds. A choice.
SMALL_LAYER_SECONDS = 1e-3


def place(plan: StagePlan, stage: TrainedStage, gpus: PlannedGpus) -> None:
    """Fill in memory, traffic and time of a training stage, for each place of its teacher, and what it would take.

    Args:
        plan: the stage's plan; its hours follow from `steps`.
    """
    devices, levels = gpus.devices, stage.levels
    level, chosen = levels[-1], None
    if devices.device_bytes is not None:
        try:
            choice = choose(stage, devices)
            level, chosen, warning = choice.activation_checkpointing, choice.chosen, choice.warning
            plan.notes += [f"warning: {warning}"] if warning else []
            plan.too_large = bool(chosen.refused)
        except RecipeError as error:
            plan.too_large = True
            plan.notes.append(error.what.partition(": ")[2] or error.what)
    plan.checkpointing = level
    plan.executed_flops_per_token = executed_flops_per_token(
        stage.student, stage.teacher_shape, stage.sequence_length, level
    )
    everywhere = _anywhere(stage)
    rows = {row.name: row for row in candidates(everywhere, devices, level)[0]}
    if chosen is not None:  # with the teacher's place, window or JSON that the recipe names
        rows[chosen.name] = chosen
    largest = {one: _largest(everywhere, devices, one) for one in levels} if devices.device_bytes is not None else {}
    for row in rows.values():
        sizes: dict[str, int] = {one: found[row.name] for one, found in largest.items() if row.name in found}
        plan.placed.append(_placed(row, stage, gpus, plan.executed_flops_per_token, sizes))
    plan.taken = chosen.name if chosen is not None else ""
    taken = plan.chosen
    if taken is not None and taken.time is not None:
        plan.notes += _small(taken.time, stage, gpus)
    if taken is not None and taken.time is not None and plan.steps is not None and not taken.refused:
        plan.cost = cost_of(taken.time.seconds * plan.steps, gpus)
    elif taken is not None and taken.unknown:
        plan.notes.append(_unknown(taken.unknown, gpus))


def _small(time: StepTime, stage: TrainedStage, gpus: PlannedGpus) -> list[str]:
    """A note if launching kernels would take longer than what they compute."""
    layers = stage.student.num_layers + (stage.teacher_shape.num_layers if stage.teacher_shape is not None else 0)
    if time.compute / stage.work(gpus.count).accumulation / max(1, layers) >= SMALL_LAYER_SECONDS:
        return []
    return [
        f"a layer computes for less than {SMALL_LAYER_SECONDS * 1e3:g} ms per micro-batch, so launching its kernels, "
        "which is not counted, takes longer: the time is only a loose lower bound"
    ]


def frozen(plan: StagePlan, models: list[Memory], precision: str, gpus: PlannedGpus, rank_flops: float) -> None:
    """Fill in memory and time of a stage that runs frozen models and trains nothing.

    Args:
        models: memory of the models that are loaded at the same time; their forward passes run one after another.
        rank_flops: FLOPs that the busiest rank executes in the whole stage.
    """
    busiest = max(models, key=lambda memory: memory.passing_bytes)
    plan.memory = {
        "weights": sum(one.resident_bytes - one.device.get("head", 0) for one in models),
        "activations": busiest.passing.get("activations", 0) + sum(one.passing.get("hidden", 0) for one in models),
        "heads": sum(one.device.get("head", 0) for one in models),
        "buffers": busiest.passing.get("gathered", 0),
    }
    usable = gpus.devices.usable_bytes
    if usable is not None and sum(plan.memory.values()) > usable:
        plan.notes.append("warning: it does not seem to fit on a device")
        plan.too_large = True
    if gpus.kind is None or plan.too_large:
        return
    rate = gpus.efficiency.rate(gpus.kind, precision)
    if rate is None:
        plan.notes.append(_unknown(("float32_flops",), gpus))
    else:
        plan.cost = cost_of(rank_flops / rate, gpus)


def _unknown(names: tuple[str, ...], gpus: PlannedGpus) -> str:
    assert gpus.kind is not None
    flags = ", ".join("--" + name.replace("_", "-") for name in names)
    return f"its time is not known: no value of {flags} is published for {gpus.kind.name}; give one"


def _anywhere(stage: TrainedStage) -> TrainedStage:
    """The stage with a teacher that may live anywhere; a reference, whose place is fixed, stays there."""
    teacher = stage.teacher
    if teacher is None or isinstance(stage.training, Align):
        return stage
    free = teacher.model_copy(update={"placement": "auto", "offload": "none", "deepspeed": None})
    return replace(stage, teacher=free)


def _largest(stage: TrainedStage, devices: Devices, level: Checkpointing) -> dict[str, int]:
    """The largest micro-batch that fits, by the teacher's place."""
    share = stage.training.batch_sequences // devices.ranks
    found: dict[str, int] = {}
    for size in (size for size in range(1, share + 1) if share % size == 0):
        training = stage.training.model_copy(update={"micro_batch_sequences": size})
        rows = candidates(replace(stage, training=training), devices, level)[0]
        found |= {row.name: size for row in rows if not row.refused}
        found |= {row.name: 0 for row in rows if row.name not in found}
        if all(row.refused for row in rows):
            break
    return found


def _placed(row: Row, stage: TrainedStage, gpus: PlannedGpus, flops: float, largest: Mapping[str, int]) -> Placed:
    devices, precision = gpus.devices, stage.training.precision
    kinds = _traffic(row, stage, devices)
    traffic = sum(kinds, Traffic())
    tokens = stage.training.batch_sequences * stage.sequence_length
    updated = 0 if stage.sharding.offload_optimizer else stage.student.parameters / gpus.count
    time = None
    unknown: tuple[str, ...] = ()
    if gpus.kind is not None:
        executed = flops * tokens / gpus.count
        time = step_time(executed, precision, kinds, updated, gpus.kind, gpus.efficiency)
        unknown = tuple(unknown_rates(gpus.kind, precision, traffic))
    return Placed(
        name=row.name,
        parts=parts(row),
        peak_bytes=row.peak_bytes,
        host_bytes=row.host_bytes,
        refused=row.refused,
        window=row.window,
        largest_micro_batch=largest,
        traffic=traffic,
        time=time,
        tokens_per_second=None if time is None else tokens / time.seconds,
        unknown=unknown,
    )


def parts(row: Row) -> dict[str, int]:
    """Bytes on one rank's device at the peak, which is while the student or while the teacher runs."""
    student, teacher = row.student, row.teacher
    device, passing, own = student.device, student.passing, teacher.passing
    hidden = own.get("hidden", 0)
    found = {
        "weights": device["weights"] + device["persistent"],
        "gradients": device.get("gradients", 0),
        "optimiser": device.get("master", 0) + device.get("moments", 0),
        "activations": own.get("activations", 0),
        "teacher": teacher.resident_bytes - teacher.device.get("head", 0) + hidden,
        "heads": teacher.device.get("head", 0),
        "buffers": device["buckets"] + own.get("gathered", 0),
    }
    if student.passing_bytes >= teacher.passing_bytes - hidden:
        found["optimiser"] += passing["update"]
        found["activations"] = passing["activations"] + passing["loss or layer"]
        found["heads"] += passing["head"]
        found["buffers"] = device["buckets"] + passing.get("gathered", 0)
    return found


def _traffic(row: Row, stage: TrainedStage, devices: Devices) -> list[Traffic]:
    """Traffic of the student, and of the teacher if there is one."""
    work, precision = stage.work(devices.ranks), stage.training.precision
    one = trained_traffic(stage.student, precision, work, devices.ranks, devices.ranks_per_node, stage.sharding)
    if row.placement is None or stage.teacher is None or stage.teacher_shape is None:
        return [one]
    other = frozen_traffic(
        stage.teacher_shape, stage.teacher.precision or precision, row.placement, row.offload, work, row.group,
        devices.ranks_per_node, stage.teacher_sharding(row.placement, row.offload), window=row.window,
    )  # fmt: skip
    return [one, other]

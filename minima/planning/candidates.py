"""Every place where a frozen teacher's weights could live, with the memory that each rank would need."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from minima.models.shape import ModelShape
from minima.planning.memory import Memory, Work, frozen_memory, trained_memory
from minima.planning.sharding import TEACHER, Sharding, gathered_ahead
from minima.planning.units import size_text
from minima.recipe.chat import Align
from minima.recipe.distillation import Distil, Offload, Placement, Teacher
from minima.recipe.schema import AnyTraining
from minima.recipe.training import Training

Checkpointing = Literal["none", "selective", "full"]
TeacherSharding = Callable[[Placement, Offload], Sharding]
LEVELS: tuple[Checkpointing, ...] = ("none", "selective", "full")

# Share of a device's memory that the plan leaves free: for the driver's context and the collectives' buffers, and for
# what the allocator loses to rounding and fragmentation. A choice, not a measurement: 76e9 bytes, the most that a step
# of the published shapes may take on a device that is sold as 80 GB and has 85e9 bytes, are 0.9 of it.
MARGIN = 0.1
# Share of a node's memory that is left for the processes, data and the page cache that feeds them. Also a choice.
HOST_MARGIN = 0.2
_ALONE = "a single rank has no other to share it with"
LARGEST_WINDOW = 8  # micro-batches: traffic is then an eighth, and a wider window would save little more


@dataclass(frozen=True)
class Devices:
    """The devices that a stage runs on. Totals, never free memory: every rank and every start must choose alike."""

    ranks: int
    ranks_per_node: int  # how many of them are on one machine
    # memory of one rank's device; on a CPU, the machine's divided by its ranks. None if not known
    device_bytes: int | None = None
    host_bytes: int | None = None  # memory of one machine; None if not known
    host_is_device: bool = False  # whether both are the same memory, as on a CPU

    @property
    def usable_bytes(self) -> int | None:
        """Bytes of a device that the plan may use."""
        return None if self.device_bytes is None else int((1 - MARGIN) * self.device_bytes)


@dataclass(frozen=True)
class Row:
    """One candidate."""

    placement: Placement | None  # the teacher's; None if there is no teacher
    offload: Offload  # where its shards lie
    group: int  # number of ranks that share one copy of it
    window: int  # micro-batches that one traversal of it serves
    checkpointing: Checkpointing  # the student's
    student: Memory  # the student's bytes on one rank
    teacher: Memory  # the teacher's bytes on one rank
    # on the device. The teacher's temporary memory is freed before the student needs its own, so only the larger of the
    # two counts
    peak_bytes: int = 0
    host_bytes: int = 0  # bytes of one machine's memory, for all of its ranks
    refused: str = ""  # why it does not fit; empty if it does, or if the devices are not known

    @property
    def name(self) -> str:
        """Placement and offload as one word."""
        return (self.placement or "no teacher") + (f"+{self.offload}" if self.offload != "none" else "")


def shipped(placement: Placement, offload: Offload) -> Sharding:
    """The sizes in the DeepSpeed JSON that ships with minima for a placement."""
    return replace(TEACHER, offload_weights=offload, pinned=offload == "cpu")


@dataclass(frozen=True)
class TrainedStage:
    """A training stage as the plan sees it."""

    name: str
    training: Training  # its settings
    student: ModelShape  # shape of the trained model
    sequence_length: int  # tokens per block
    sharding: Sharding  # sizes in the student's DeepSpeed JSON
    teacher: Teacher | None = None  # the recipe's; None if the stage has no frozen model
    teacher_shape: ModelShape | None = None  # its shape
    teacher_sharding: TeacherSharding = shipped  # sizes in its DeepSpeed JSON, by placement and offload

    @property
    def levels(self) -> tuple[Checkpointing, ...]:
        """The levels of activation checkpointing to try, the least recomputation first."""
        asked = self.training.activation_checkpointing
        return LEVELS if asked == "auto" else (asked,)

    def work(self, ranks: int) -> Work:
        """What each of `ranks` ranks processes at once."""
        micro_batch = self.training.micro_batch_on(ranks)
        return Work(
            micro_batch_sequences=micro_batch,
            sequence_length=self.sequence_length,
            chunk_tokens=getattr(self.training, "chunk_tokens", 1024),
            accumulation=self.training.batch_sequences // (ranks * micro_batch),
        )


def trained_stage(
    stage: AnyTraining,
    student: ModelShape,
    teacher_shape: ModelShape | None,
    sequence_length: int,
    sharding: Callable[[str], Sharding],
) -> TrainedStage:
    """What a stage of a recipe trains, for its run and for its plan alike.

    Args:
        teacher_shape: shape of the teacher or the reference; None if the stage has no frozen model.
        sharding: returns the sizes in the DeepSpeed JSON of a given name.
    """
    teacher = None
    if isinstance(stage, Distil) and teacher_shape is not None:
        teacher = stage.teacher
    if isinstance(stage, Align) and teacher_shape is not None:
        teacher = _reference(stage, sharding(stage.reference_deepspeed))
    named = sharding(teacher.deepspeed) if teacher is not None and teacher.deepspeed is not None else None
    teacher_sharding = shipped if named is None else lambda placement, offload: named
    return TrainedStage(
        name=stage.name,
        training=stage,
        student=student,
        sequence_length=sequence_length,
        sharding=sharding(stage.deepspeed),
        teacher=teacher,
        teacher_shape=teacher_shape,
        teacher_sharding=teacher_sharding,
    )


def _reference(stage: Align, sharding: Sharding) -> Teacher:
    """The frozen reference as a teacher: over all ranks, placed by its JSON, with one micro-batch at a time."""
    return Teacher(
        source="reference",
        placement="zero3",
        offload="none" if sharding.offload_weights == "none" else "cpu",  # a JSON with NVMe is refused for it
        window_micro_batches=1,
        precision=stage.reference_precision,
        deepspeed=stage.reference_deepspeed,
    )


def candidates(stage: TrainedStage, devices: Devices, checkpointing: Checkpointing) -> tuple[list[Row], list[str]]:
    """All possible places, in the order in which they are tried, and a sentence for each impossible one.

    A place that the recipe names is the only candidate, refused if it is impossible.
    """
    trained = trained_memory(
        stage.student,
        stage.training.precision,
        checkpointing,
        stage.work(devices.ranks),
        devices.ranks,
        gathered_ahead(stage.sharding, stage.student),
        taught=stage.teacher is not None,
    )
    if stage.teacher is None or stage.teacher_shape is None:
        return [_judged(Row(None, "none", 1, 1, checkpointing, trained, Memory()), devices)], []
    rows, excluded = [], []
    for placement, offload, group, problem in _places(stage.teacher, stage.teacher_shape, devices):
        if problem and stage.teacher.placement == "auto":
            excluded.append(f"{placement}{'' if offload == 'none' else '+' + offload} is impossible: {problem}")
            continue
        row = _widest(stage, devices, checkpointing, trained, placement, offload, group)
        rows.append(replace(row, refused=f"is impossible: {problem}") if problem else row)
    return rows, excluded


def _places(teacher: Teacher, shape: ModelShape, devices: Devices) -> Iterator[tuple[Placement, Offload, int, str]]:
    """Placement, offload, ranks that share a copy, and why it is impossible (or ""), in the order of `auto`."""
    node = min(devices.ranks, devices.ranks_per_node)
    nodes = -(-devices.ranks // node)
    split = teacher.tensor_parallel_ranks or node
    groups: dict[Placement, int] = {"replica": 1, "zero3_node": node, "zero3": devices.ranks, "tensor_parallel": split}
    unsplittable = _unsplittable(shape, split, node)
    if teacher.placement != "auto":
        problem = unsplittable if teacher.placement == "tensor_parallel" else ""
        yield teacher.placement, teacher.offload, groups[teacher.placement], problem
        return
    uneven = "the machines have different numbers of ranks" if devices.ranks % node else ""
    same = "on one machine it is the same as zero3_node" if nodes == 1 else ""
    yield "replica", "none", 1, ""
    yield "zero3_node", "none", node, uneven or (_ALONE if node == 1 else "")
    yield "zero3", "none", devices.ranks, same if node > 1 else (_ALONE if nodes == 1 else "")
    yield "tensor_parallel", "none", split, unsplittable or uneven
    both = "host and device share one memory" if devices.host_is_device else ""
    missing = "" if teacher.nvme_path is not None else "no nvme_path is given"
    for offload, problem in (("cpu", both), ("nvme", missing)):
        yield "zero3_node", offload, node, problem or uneven  # type: ignore[misc]
        if nodes > 1:
            yield "zero3", offload, devices.ranks, problem  # type: ignore[misc]


def impossible(teacher: Teacher, shape: ModelShape, ranks: int) -> str:
    """Why the placement that a recipe names is impossible on machines of `ranks` ranks; empty if it is possible."""
    named = teacher.placement != "auto"
    return next(_places(teacher, shape, Devices(ranks, ranks)))[-1] if named else ""


def _unsplittable(shape: ModelShape, split: int, node: int) -> str:
    if node % split and shape.family != "gpt2":
        return f"groups of {split} ranks do not fill a machine of {node}"
    return never_splits(shape, split)


def never_splits(shape: ModelShape, split: int | None) -> str:
    """Why no machine can split a model of this shape; empty if one may.

    Args:
        split: number of ranks that one copy is split over; None if that depends on the machine.
    """
    if shape.family == "gpt2":
        return "DeepSpeed's AutoTP cannot split a gpt2"
    if split is None:
        return ""
    if split == 1:
        return _ALONE
    for count, what in ((shape.num_heads, "heads"), (shape.num_key_value_heads, "key-value heads")):
        if count % split:
            return f"{count} {what} are not divisible by {split} ranks"
    return ""


def _widest(
    stage: TrainedStage,
    devices: Devices,
    checkpointing: Checkpointing,
    trained: Memory,
    placement: Placement,
    offload: Offload,
    group: int,
) -> Row:
    """The candidate with the widest window that fits, or with the narrowest one if none does."""
    assert stage.teacher is not None and stage.teacher_shape is not None
    work = stage.work(devices.ranks)
    travels = placement in ("zero3_node", "zero3") and (group > 1 or offload != "none")
    widest = min(work.accumulation, LARGEST_WINDOW) if travels else 1
    named = stage.teacher.window_micro_batches
    windows = [min(named, work.accumulation)] if named is not None else list(range(widest, 0, -1))
    precision = stage.teacher.precision or stage.training.precision
    sharding = stage.teacher_sharding(placement, offload)
    for window in windows:
        frozen = frozen_memory(stage.teacher_shape, precision, placement, offload, work, group, sharding, window=window)
        row = _judged(Row(placement, offload, group, window, checkpointing, trained, frozen), devices)
        if not row.refused:
            break
    return row


def _judged(row: Row, devices: Devices) -> Row:
    """The candidate with its sums, and with the reason if it does not fit."""
    student, teacher = row.student, row.teacher
    hidden = teacher.passing.get("hidden", 0)
    passing = max(student.passing_bytes, teacher.passing_bytes - hidden)
    peak = student.resident_bytes + teacher.resident_bytes + hidden + passing
    host = student.host_bytes + teacher.host_bytes
    if devices.host_is_device:
        peak, host = peak + host, 0
    host *= min(devices.ranks, devices.ranks_per_node)
    refused = []
    if devices.usable_bytes is not None and peak > devices.usable_bytes:
        refused.append(f"needs {size_text(peak)} on a device with {size_text(devices.usable_bytes)} usable")
    usable = None if devices.host_bytes is None else int((1 - HOST_MARGIN) * devices.host_bytes)
    if usable is not None and host > usable:
        refused.append(f"needs {size_text(host)} on a machine with {size_text(usable)} of memory usable")
    return replace(row, peak_bytes=peak, host_bytes=host, refused=" and ".join(refused))

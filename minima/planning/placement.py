"""Choose where a frozen teacher's weights live, what is recomputed, and the window: the first that fits, and why."""

from dataclasses import dataclass

from minima.errors import RecipeError
from minima.planning.candidates import LEVELS, MARGIN, Checkpointing, Devices, Row, TrainedStage, candidates
from minima.planning.units import size_text
from minima.recipe.distillation import Offload, Placement, Teacher

_COLUMNS = ("weights", "gathered", "activations", "head", "hidden", "student", "peak", "host")
_UNITS = (
    "weights to hidden: the teacher's, on a rank's device. student: all of the student's. peak: less than",
    "their sum, since the teacher's gathered layer and activations are freed before the student's.",
    "host: of one machine's memory, for all of its ranks.",
)


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why."""

    placement: Placement | None  # where the teacher's weights live; None if there is no teacher
    offload: Offload  # where its shards lie
    activation_checkpointing: Checkpointing  # what the student's backward pass recomputes
    window_micro_batches: int  # micro-batches that one traversal of the teacher serves
    tensor_parallel_ranks: int | None  # ranks that one copy is split over; None for other placements
    reason: str  # a sentence for each candidate that was passed over; empty if the first one was chosen
    warning: str  # what the recipe asks for but does not seem to fit or is impossible; empty otherwise
    rows: tuple[Row, ...]  # all candidates at the chosen checkpointing
    chosen: Row
    devices: Devices


def choose(stage: TrainedStage, devices: Devices) -> Choice:
    """Resolve `auto` in a stage, from total memory alone, so that every rank and every start makes the same choice.

    A placement, checkpointing or window that the recipe names is used as it is, with a warning if it does not seem to
    fit. Recomputing costs more than gathering within a node, so the least recomputation with which the teacher fits on
    the devices is tried first, and only then host memory.

    Args:
        devices: what it runs on; `device_bytes` must be known.

    Raises:
        RecipeError: `auto` finds nothing that fits; includes the memory table.
    """
    assert devices.device_bytes is not None, "what fits is not known"
    teacher, levels = stage.teacher, stage.levels
    tables = {level: candidates(stage, devices, level) for level in levels}
    for offload in ("none", "cpu", "nvme"):
        for level in levels:
            for row in tables[level][0]:
                if row.offload == offload and not row.refused:
                    return _choice(row, tables, devices, _too_wide(teacher, row))
    rows = tables[levels[-1]][0]
    if teacher is None or teacher.placement != "auto":
        who = rows[0].name if teacher is not None else "the trained model"
        warnings = [f"{who} {rows[0].refused}", _too_wide(teacher, rows[0])]
        return _choice(rows[0], tables, devices, "; ".join(filter(None, warnings)))
    least = min(rows, key=lambda row: row.peak_bytes)
    raise RecipeError(
        f"stages.{stage.name}: the teacher fits nowhere next to the student with activation_checkpointing {levels[-1]}",
        f"the smallest, {least.name}, {least.refused}, so the run would fail in the middle of a step:\n"
        + "\n".join(table(rows, devices)),
        "lower micro_batch_sequences, keep the optimiser in host memory with deepspeed: "
        "student_zero3_offload.json, use more ranks, or set a placement to try it anyway",
    )


def _too_wide(teacher: Teacher | None, row: Row) -> str:
    """A warning if a step has fewer micro-batches than the window that the recipe names; empty otherwise."""
    named = teacher.window_micro_batches if teacher is not None else None
    if named is None or named <= row.window:
        return ""
    return (
        f"window_micro_batches is {named}, but a step has only {row.window} micro-batches on each rank, so the window "
        f"is {row.window}"
    )


def _choice(
    row: Row, tables: dict[Checkpointing, tuple[list[Row], list[str]]], devices: Devices, warning: str = ""
) -> Choice:
    rows, excluded = tables[row.checkpointing]
    passed = []
    less = LEVELS[: LEVELS.index(row.checkpointing)] if row.offload == "none" else LEVELS  # recomputation on the device
    for level in less:
        others = [other for other in tables[level][0] if other.offload == "none"] if level in tables else []
        if others and level != row.checkpointing:
            least = min(others, key=lambda other: other.peak_bytes)
            passed.append(f"with activation_checkpointing {level}, {least.name} as the smallest {least.refused}")
    passed += [f"{other.name} {other.refused}" for other in rows[: rows.index(row)] if other.refused]
    passed += excluded if row.offload != "none" or row.placement == "tensor_parallel" else []
    return Choice(
        placement=row.placement,
        offload=row.offload,
        activation_checkpointing=row.checkpointing,
        window_micro_batches=row.window,
        tensor_parallel_ranks=row.group if row.placement == "tensor_parallel" else None,
        reason="; ".join(passed),
        warning=warning,
        rows=tuple(rows),
        chosen=row,
        devices=devices,
    )


def table(rows: list[Row] | tuple[Row, ...], devices: Devices) -> list[str]:
    """The lines of a memory table, one for each candidate, at most 100 columns wide."""
    widths = [max(8, len(name) + 1) for name in _COLUMNS]
    lines = [f"{'placement':<16}" + "".join(f"{name:>{width}}" for name, width in zip(_COLUMNS, widths, strict=True))]
    lines[0] += "  fits"
    for row in rows:
        teacher, fits = row.teacher, "-" if devices.usable_bytes is None else "no" if row.refused else "yes"
        sizes = [
            teacher.device.get("weights", 0) + teacher.device.get("persistent", 0),
            teacher.passing.get("gathered", 0),
            teacher.passing.get("activations", 0),
            teacher.device.get("head", 0),
            teacher.passing.get("hidden", 0),
            row.student.device_bytes,
            row.peak_bytes,
            row.host_bytes,
        ]
        cells = [f"{size_text(size) if size else '-':>{width}}" for size, width in zip(sizes, widths, strict=True)]
        lines.append(f"{row.name:<16}" + "".join(cells) + f"{fits:>6}")
    return lines


def render(choice: Choice) -> str:
    """The memory table of a choice, with what was chosen and why."""
    devices, row = choice.devices, choice.chosen
    assert devices.device_bytes is not None and devices.usable_bytes is not None, "what fits is not known"
    taken = f"activation_checkpointing {choice.activation_checkpointing}"
    if choice.placement is not None:
        taken = f"teacher {row.name}, window_micro_batches {row.window}, " + taken
    lines = [
        f"memory of one rank ({devices.ranks} ranks, {devices.ranks_per_node} on a machine); usable: "
        f"{size_text(devices.usable_bytes)}, {1 - MARGIN:.0%} of a device",
        *table(choice.rows, devices),
        *_UNITS,
        f"taken: {taken}",
    ]
    lines += [f"because {choice.reason}"] if choice.reason else []
    lines += [f"warning: {choice.warning}"] if choice.warning else []
    return "\n".join(lines)


def unchosen(stage: TrainedStage, ranks: int) -> list[str]:
    """The memory table of a stage where the devices that it will run on are not known: everything that could be."""
    devices = Devices(ranks, ranks)
    tables = {level: candidates(stage, devices, level)[0] for level in stage.levels}
    students = [f"{size_text(rows[0].student.device_bytes)} with {level}" for level, rows in tables.items()]
    lines = [f"per rank, {ranks} ranks on one machine; the student, by activation_checkpointing: {', '.join(students)}"]
    if stage.teacher is None:
        return lines
    rows = tables[stage.levels[-1]]
    lines += table(rows, devices) + list(_UNITS)
    lines += [f"{row.name} {row.refused}" for row in rows if row.refused]
    return [*lines, f"what fits is decided where the stage runs: peak may be up to {1 - MARGIN:.0%} of a device"]

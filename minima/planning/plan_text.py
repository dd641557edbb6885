"""The text of a run's plan: a table for each stage, a summary, and what is assumed; 100 columns. No torch."""

import textwrap
from collections.abc import Callable

from minima.planning.candidates import MARGIN
from minima.planning.hardware import GPUS, Gpu
from minima.planning.run_plan import PARTS, Placed, PlannedGpus, StagePlan, known_cost, total_cost, untimed
from minima.planning.throughput import ASSUMED_FRACTION, LINK_FRACTION
from minima.planning.units import scaled, size_text

WIDTH, _LABEL, _COLUMN = 100, 20, 10
_HEADS = {
    "zero3_node": ("zero3", "node"),
    "tensor_parallel": ("tensor", "parallel"),
    "zero3_node+cpu": ("zero3", "node+cpu"),
    "zero3_node+nvme": ("zero3", "node+nvme"),
    "zero3+cpu": ("zero3", "+cpu"),
    "zero3+nvme": ("zero3", "+nvme"),
    "no teacher": ("", "alone"),
}


def number(value: float | None, digits: int = 3) -> str:
    """A number with thousands separators if it is large, else with `digits` significant digits."""
    if value is None:
        return "-"
    if 0 < abs(value) < 10 ** (digits - 1):
        return f"{value:.{digits}g}"
    text = f"{value:,.0f}"
    return text if len(text) < _COLUMN else f"{value:.4g}"


def hours(value: float | None) -> str:
    """Hours or GPU-hours."""
    return "< 0.001" if value is not None and 0 < value < 0.001 else number(value)


def flops(value: float) -> str:
    """FLOPs in a readable unit."""
    return scaled(value, "FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP")


def _size(value: float) -> str:
    return size_text(round(value)) if value else "-"


def stage_lines(plan: StagePlan, gpus: PlannedGpus) -> list[str]:
    """The lines of one stage: what it is, its table, and what is not known about it."""
    lines = [f"{plan.name} ({plan.kind})"]
    if plan.parameters is not None:
        other = f", plus {plan.frozen_parameters:,} frozen ones" if plan.frozen_parameters else ""
        lines += _wrapped("model", f"{plan.parameters:,} parameters{other}")
    if plan.tokens is not None:
        steps = f" in {plan.steps:,} steps" if plan.steps is not None else ""
        lines += _wrapped("tokens", f"{plan.tokens:,}{steps}{'; ' + plan.batch if plan.batch else ''}")
    if plan.flops_per_token is not None:
        executed = plan.executed_flops_per_token
        how = f"activation_checkpointing {plan.checkpointing}" if plan.checkpointing else "recomputation"
        more = f", {flops(executed)} with {how}" if executed else ""
        more = f" ({how})" if executed == plan.flops_per_token else more
        whole = f"; {plan.flops:.3e} FLOP in all" if plan.flops is not None else ""
        lines += _wrapped("FLOPs", f"{flops(plan.flops_per_token)} per token{more}{whole}")
    if plan.memory:
        sizes = ", ".join(f"{name} {size_text(size)}" for name, size in plan.memory.items() if size)
        lines += _wrapped("memory", f"{size_text(sum(plan.memory.values()))} per GPU: {sizes}")
    if plan.disk:
        lines += _wrapped("disk", ", ".join(f"{name} {size_text(size)}" for name, size in plan.disk.items()))
    if plan.placed:
        lines += _table(plan, gpus)
        taken = plan.chosen
        if taken is not None:
            window = f"{taken.window} micro-batch{'es' if taken.window > 1 else ''}"
            own = "" if taken.name == "no teacher" else f"{taken.name}, a window of {window}, "
            lines += _wrapped("taken", f"{own}activation_checkpointing {plan.checkpointing}")
    if plan.cost is not None and not plan.placed:
        lines += _wrapped("time", f"{hours(plan.cost.hours)} hours, {hours(plan.cost.gpu_hours)} GPU-hours")
    for note in plan.notes:
        lines += _wrapped("note", note)
    return lines


def _table(plan: StagePlan, gpus: PlannedGpus) -> list[str]:
    """The table with one column for each place of the teacher."""
    columns = plan.placed
    heads = [_HEADS.get(one.name, ("", one.name)) for one in columns]
    lines = [_line(label, [head[part] for head in heads]) for part, label in enumerate(("", "  one GPU's memory"))]
    lines = [line for line in lines if line]

    def row(label: str, cell: Callable[[Placed], str]) -> None:
        cells = [cell(one) for one in columns]
        if any(cell not in ("-", "") for cell in cells):
            lines.append(_line("    " + label, cells))

    for part in PARTS:
        row(part, lambda one, part=part: _size(one.parts[part]))  # type: ignore[misc]
    row("= peak", lambda one: _size(one.peak_bytes))
    row("machine's memory", lambda one: _size(one.host_bytes))
    if gpus.kind is not None:
        row("fits", lambda one: "no" if one.refused else "yes")
        levels = [level for level in ("none", "selective", "full") if level in columns[0].largest_micro_batch]
        lines.append(_line("  largest micro-batch, recomputing", []))
        for level in levels:
            row(level, lambda one, level=level: _largest(one, level))  # type: ignore[misc]
    lines.append(_line("  one GPU's traffic of a step", []))
    row("within a machine", lambda one: _size(one.traffic.within_node))
    row("between machines", lambda one: _size(one.traffic.between_nodes))
    row("from the host", lambda one: _size(one.traffic.from_host))
    row("to the host", lambda one: _size(one.traffic.to_host))
    row("from NVMe", lambda one: _size(one.traffic.from_disk))
    if not lines[-1].startswith("    "):
        lines[-1] += ": none"
    if gpus.kind is not None and any(one.time is not None for one in columns):
        lines.append(_line("  time of all GPUs", []))
        row("seconds a step", lambda one: _timed(one, lambda: number(one.time.seconds)))  # type: ignore[union-attr]
        row("tokens/s", lambda one: _timed(one, lambda: number(one.tokens_per_second)))
        row("tokens/s, hidden", lambda one: _timed(one, lambda: number(_hidden(one))))
        if plan.steps is not None:
            steps = plan.steps
            row("hours", lambda one: _timed(one, lambda: hours(_hours(one, steps))))
            row("GPU-hours", lambda one: _timed(one, lambda: hours(_hours(one, steps) * gpus.count)))
            if gpus.price is not None:
                price = gpus.price * gpus.count
                row("cost", lambda one: _timed(one, lambda: number(_hours(one, steps) * price)))
    return lines


def _largest(one: Placed, level: str) -> str:
    size = one.largest_micro_batch.get(level)
    return "-" if size is None else str(size) if size else "none"


def _timed(one: Placed, text: Callable[[], str]) -> str:
    return "-" if one.time is None or one.refused else text()


def _hidden(one: Placed) -> float:
    assert one.time is not None and one.tokens_per_second is not None
    return one.tokens_per_second * one.time.seconds / one.time.overlapped


def _hours(one: Placed, steps: int) -> float:
    assert one.time is not None
    return one.time.seconds * steps / 3600


def _line(label: str, cells: list[str]) -> str:
    return (f"{label:<{_LABEL}}" + "".join(f"{cell:>{_COLUMN}}" for cell in cells)).rstrip()


def _wrapped(label: str, text: str) -> list[str]:
    return _filled(text, f"  {label:<8}", " " * 10)


def _filled(text: str, first: str, others: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=others,
                         break_long_words=False, break_on_hyphens=False)  # fmt: skip


def summary_lines(plans: list[StagePlan], gpus: PlannedGpus) -> list[str]:
    """The lines of the summary: all stages, one line each, and their sum."""
    heads = ("parameters", "tokens", "FLOP", "tokens/s", "hours", "GPU-hours", "cost", "disk")
    widths = (11, 10, 10, 10, 8, 10, 11, 9)
    lines = ["all stages", _row("", heads, widths)]
    for plan in plans:
        cost, taken = plan.cost, plan.chosen
        speed = None if taken is None or taken.refused else taken.tokens_per_second
        disk = max(plan.disk.values(), default=0)
        cells = (
            f"{plan.parameters:.3g}" if plan.parameters else "-",
            f"{plan.tokens:.3g}" if plan.tokens else "-",
            f"{plan.flops:.2e}" if plan.flops else "-",
            number(speed),
            hours(cost.hours if cost else None),
            hours(cost.gpu_hours if cost else None),
            number(cost.price if cost else None),
            _size(disk),
        )
        lines.append(_row(plan.name, cells, widths))
    whole = total_cost(plans, gpus)
    disk = sum(max(plan.disk.values(), default=0) for plan in plans)
    work = sum(plan.flops or 0 for plan in plans)
    costs = ("-", "-", "-")
    if whole is not None:
        costs = (hours(whole.hours), hours(whole.gpu_hours), number(whole.price))
    lines.append(_row("total", ("", "", f"{work:.2e}" if work else "-", "", *costs, _size(disk)), widths))
    if gpus.kind is not None:
        for note in _untimed_notes(plans, gpus):
            lines += _wrapped("note", note)
    return lines


def _untimed_notes(plans: list[StagePlan], gpus: PlannedGpus) -> list[str]:
    """Which stages have no time, why, and whether a total lacks them."""
    found, left = untimed(plans), known_cost(plans, gpus)
    notes = [f"no GPU time is spent by {', '.join(found.idle)}"] if found.idle else []
    if found.too_large:
        notes.append(f"no total: {', '.join(found.too_large)} would not fit on these GPUs")
    if found.unknown:
        notes.append(f"no total: no time is known for {', '.join(found.unknown)}")
    if found.unknown and not found.too_large and left.hours:
        price = "" if left.price is None else f", cost {number(left.price)}"
        notes[-1] += f"; the others take {hours(left.hours)} hours, {hours(left.gpu_hours)} GPU-hours{price}"
    return notes


def _row(name: str, cells: tuple[str, ...], widths: tuple[int, ...]) -> str:
    name = name if len(name) <= 18 else name[:17] + "…"
    return (f"  {name:<18}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))).rstrip()


def assumptions(gpus: PlannedGpus) -> list[str]:
    """What the numbers assume, each in a sentence."""
    found = [
        f"{1 - MARGIN:.0%} of a device may be used; the memory plan was checked against the tensors of two and of four "
        "CPU ranks, not of GPUs",
        "traffic is that of ring collectives, and was checked on the same ranks",
        "hours cover training steps, and the FLOPs of prune and evaluate stages; they do not include transfers in "
        "these two, the latency of collectives, held-out losses during training, checkpoints, starts, failures and "
        "benchmarks",
    ]
    gpu, efficiency = gpus.kind, gpus.efficiency
    if gpu is None:
        return [*found, "no GPU is given, so what fits and how long it takes is not known: give --gpu"]
    fraction = f"{efficiency.fraction:.3g} of the published peak of {gpu.peak_flops / 1e12:,.0f} TFLOP/s"
    if efficiency.measured:
        assert efficiency.against_assumed is not None
        speed = (
            f"computed from a measured speed: a step executes {fraction} ({efficiency.reason}); "
            f"the {ASSUMED_FRACTION} that would otherwise be assumed is {1 / efficiency.against_assumed:.2f} of that"
        )
    else:
        speed = f"computed, not measured: a step is assumed to execute {fraction} ({efficiency.reason}), on "
        speed += "any number of GPUs"
    network = f"{gpu.network_bandwidth / 1e9:,.0f} GB/s" if gpu.network_bandwidth else "an unknown bandwidth"
    return [
        speed,
        f"one {gpu.name} has {_memory(gpu)} at {gpu.memory_bandwidth / 1e12:.3g} TB/s, "
        f"{gpu.node_bandwidth / 1e9:,.0f} GB/s to its machine's other GPUs and {network} to other machines; "
        f"source: {gpu.source}",
        f"links carry {LINK_FRACTION:.0%} of that, a choice; tokens/s assume that no transfer is hidden behind "
        "computation, `hidden` that all are; NVMe and the host's Adam are taken to cost no time",
        *found,
    ]


def _memory(gpu: Gpu) -> str:
    size, published = size_text(gpu.memory_bytes), GPUS.get(gpu.name)
    if published is None or published.memory_bytes != gpu.memory_bytes:
        return size
    return (
        f"{size} (a card may report up to 7 % more, so near the limit a run may choose a less frugal "
        "setting than `taken`; pass what it reports with --gpu-memory)"
    )


def render(plans: list[StagePlan], gpus: PlannedGpus, notes: list[str]) -> str:
    """The whole text of `minima plan`."""
    kind = gpus.kind.name if gpus.kind is not None else "GPUs of unknown kind"
    machines = f"{gpus.nodes} machine{'s' if gpus.nodes > 1 else ''} of {gpus.count // gpus.nodes}"
    lines = [f"plan for {gpus.count:,} x {kind} on {machines}"]
    for plan in plans:
        lines += ["", *stage_lines(plan, gpus)]
    lines += ["", *summary_lines(plans, gpus), "", "assumed"]
    for note in notes:
        lines += _filled(note, "  - ", "    ")
    return "\n".join(lines)

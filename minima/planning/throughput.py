"""The time of a step: FLOPs over a share of the peak (assumed or measured), and bytes over bandwidth. No torch."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minima.models.shape import ModelShape
from minima.planning.arithmetic import executed_flops_per_token
from minima.planning.hardware import Gpu
from minima.planning.traffic import Traffic

# Share of the published peak that a step reaches: Meta reports 38 to 43 % for training Llama 3 405B on 8,192 and
# 16,384 H100s in bfloat16 (arXiv 2407.21783, sec. 3.3.2), transfers included.
ASSUMED_FRACTION = 0.4
ASSUMED_REASON = "38 to 43 % are reported for Llama 3 405B on H100s, arXiv 2407.21783, sec. 3.3.2"
# Share of a link's published bandwidth that collectives reach. A choice, not a measurement.
LINK_FRACTION = 0.8
# Adam reads a gradient, a master weight and two moments in float32, and writes the last three and a bfloat16 weight.
UPDATE_BYTES = 4 * 4 + 3 * 4 + 2


@dataclass(frozen=True)
class Efficiency:
    """The share of a GPU's peak that a step reaches."""

    fraction: float = ASSUMED_FRACTION  # share of `Gpu.peak_flops`, in bfloat16; recomputed FLOPs count
    reason: str = ASSUMED_REASON  # where it comes from
    measured: bool = False
    against_assumed: float | None = None  # the measured speed, relative to that of the same run at the assumed fraction

    def rate(self, gpu: Gpu, precision: str) -> float | None:
        """FLOP/s of one GPU; None if its speed in this precision is not known.

        A measurement in bfloat16 says nothing about float32, which does not run on tensor cores.
        """
        if precision == "bfloat16":
            return self.fraction * gpu.peak_flops
        fraction = ASSUMED_FRACTION if self.measured else self.fraction
        return None if gpu.float32_flops is None else fraction * gpu.float32_flops


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step."""

    compute: float  # FLOPs, with recomputation
    update: float  # the optimiser's pass over its shard
    transfer: float  # collectives
    host: float  # copies between host memory and the device

    @property
    def seconds(self) -> float:
        """The time if no transfer is hidden behind computation."""
        return self.compute + self.update + self.transfer + self.host

    @property
    def overlapped(self) -> float:
        """The time if transfers are hidden behind computation as far as possible."""
        return max(self.compute + self.update, self.transfer, self.host)


def unknown_rates(gpu: Gpu, precision: str, traffic: Traffic) -> list[str]:
    """Fields of a GPU that a step's time depends on and that are not known."""
    wanted = {
        "float32_flops": precision != "bfloat16",
        "network_bandwidth": traffic.between_nodes > 0,
        "host_bandwidth": traffic.from_host + traffic.to_host > 0,
    }
    return [name for name, needed in wanted.items() if needed and getattr(gpu, name) is None]


def step_time(
    flops: float, precision: str, traffic: Sequence[Traffic], updated: float, gpu: Gpu, efficiency: Efficiency
) -> StepTime | None:
    """Seconds of one optimiser step on one rank.

    A ring runs through the machine's own links and its network at once, so the slower of the two decides; the student's
    ring and the teacher's, which may stay within a machine, run one after the other, and each is as slow as its own.

    Args:
        flops: FLOPs that one rank executes.
        precision: precision in which it executes them.
        traffic: one rank's traffic: the student's, and the teacher's if there is one.
        updated: parameters of one rank's shard that the device updates.

    Returns:
        The time; None if a number of the GPU that it needs is not known (`unknown_rates`).
    """
    rate = efficiency.rate(gpu, precision)
    whole = sum(traffic, Traffic())
    if rate is None or unknown_rates(gpu, precision, whole):
        return None
    rings = 0.0
    for one in traffic:
        between = one.between_nodes / gpu.network_bandwidth if gpu.network_bandwidth else 0.0
        rings += max(one.within_node / gpu.node_bandwidth, between)
    copied = max(whole.from_host, whole.to_host)  # both directions at once
    return StepTime(
        compute=flops / rate,
        update=UPDATE_BYTES * updated / gpu.memory_bandwidth,
        transfer=rings / LINK_FRACTION,
        host=copied / gpu.host_bandwidth / LINK_FRACTION if gpu.host_bandwidth else 0.0,
    )


def measured_efficiency(gpu: Gpu, files: Iterable[Path]) -> Efficiency | None:
    """The share of its peak that a benchmark of minima's own step reached on this GPU.

    Only benchmarks of one rank count: with more, the time would already include transfers. Of several files, the newest
    counts; within a file, the step as shipped (`b:minima`) before the one with a fixed micro-batch (`a:minima`).

    Args:
        files: what `tools/bench_distil.py` wrote.

    Returns:
        The efficiency; None if no file is of this GPU.
    """
    found: list[tuple[str, str, Efficiency]] = []
    for path in files:
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            efficiency = _of(result, gpu, path.name)
            date = str(result["environment"].get("date", "")) if efficiency else ""
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # another kind of file: the folder also holds benchmarks of data and checkpoints
        if efficiency is not None:
            found.append((date, path.name, efficiency))
    return max(found, key=lambda one: one[:2])[2] if found else None


def _of(result: dict[str, Any], gpu: Gpu, name: str) -> Efficiency | None:
    shapes, reported = result["shapes"], result["environment"].get("gpu") or ""
    if gpu.reported_as is None or gpu.reported_as not in reported or shapes["ranks"] != 1:
        return None
    rows = {
        row["group"]: row
        for row in result["rows"]
        if (row["what"], row["precision"], row["status"]) == ("minima", "bfloat16", "measured")
    }
    row = rows.get("b") or rows.get("a")
    if row is None:
        return None
    flops = executed_flops_per_token(
        ModelShape(**shapes["student"]),
        ModelShape(**shapes["teacher"]),
        shapes["sequence_tokens"],
        shapes["activation_checkpointing"],
    )
    fraction = row["tokens_per_second"] * flops / gpu.peak_flops
    reason = f"{row['tokens_per_second']:,.0f} tokens/s of {row['name']!r} in {name}, measured on {reported}"
    return Efficiency(fraction, reason, True, fraction / ASSUMED_FRACTION)

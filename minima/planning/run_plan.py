"""The plan of a run: the GPUs that it is planned for, and what each stage needs. No torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from minima.errors import RecipeError
from minima.planning.candidates import Devices
from minima.planning.hardware import Gpu
from minima.planning.throughput import Efficiency, StepTime
from minima.planning.traffic import Traffic

PARTS = ("weights", "gradients", "optimiser", "activations", "teacher", "heads", "buffers")


@dataclass(frozen=True)
class PlannedGpus:
    """The GPUs that a run is planned for."""

    count: int  # number of GPUs, which is the number of ranks
    per_node: int  # GPUs in one machine
    kind: Gpu | None = None  # kind of GPU; None if not given, and then there are no times
    efficiency: Efficiency = field(default_factory=Efficiency)  # the share of their peak that a step reaches
    price: float | None = None  # price of one GPU-hour, in any currency; None if not given, and then there are no costs
    host_bytes: int | None = None  # memory of one machine; None if not known

    def __post_init__(self) -> None:
        for flag, given in (("gpus", self.count), ("gpus-per-node", self.per_node)):
            if given < 1:
                raise RecipeError(f"--{flag} {given}", "nothing can run on it", "give a number of at least 1")
        if self.count > self.per_node and self.count % self.per_node:
            raise RecipeError(
                f"{self.count} GPUs do not fill machines of {self.per_node}",
                "traffic between machines is planned for machines of equal size",
                "give another number of --gpus, or set --gpus-per-node to the number in one machine",
            )
        if self.price is not None and not 0 <= self.price < math.inf:
            raise RecipeError(f"--price {self.price:g}", "a GPU-hour has no negative price", "give 0 or more")

    @property
    def nodes(self) -> int:
        """The number of machines."""
        return -(-self.count // self.per_node)

    @property
    def devices(self) -> Devices:
        """The GPUs as input to the memory plan."""
        memory = None if self.kind is None else self.kind.memory_bytes
        return Devices(self.count, min(self.count, self.per_node), memory, self.host_bytes)


@dataclass(frozen=True)
class Cost:
    """What a stage, or a whole run, costs."""

    hours: float  # wall-clock hours
    gpu_hours: float  # hours times GPUs
    price: float | None  # price of all GPU-hours; None if no price is given


@dataclass(frozen=True)
class Placed:
    """One possible place of the teacher."""

    name: str  # placement and offload; `no teacher` if there is none
    parts: Mapping[str, int]  # bytes on one rank's device at the moment of the peak, by part; they add up to the peak
    peak_bytes: int  # bytes on one rank's device
    host_bytes: int  # bytes of one machine's memory
    refused: str  # why it does not fit; empty if it does, or if the GPU is not known
    window: int  # micro-batches that one traversal of the teacher serves
    # sequences of the largest micro-batch that fits, by activation_checkpointing; 0 if none does. Empty if the GPU is
    # not known
    largest_micro_batch: Mapping[str, int]
    traffic: Traffic  # traffic of one rank in one step
    time: StepTime | None = None  # time of one step; None if the GPU is not known
    tokens_per_second: float | None = None  # over all ranks; None if the time is not known
    unknown: tuple[str, ...] = ()  # fields of the GPU that the time depends on and that are not known


@dataclass
class StagePlan:
    """The plan of one stage. What is not known is None or empty, and a note says so."""

    name: str
    kind: str
    parameters: int | None = None  # parameters of its model
    frozen_parameters: int | None = None  # parameters of the teacher or the reference
    tokens: int | None = None  # tokens that it reads, over all passes
    steps: int | None = None  # optimiser steps
    batch: str = ""  # how a step is divided, in words
    flops_per_token: float | None = None  # FLOPs that its models need
    executed_flops_per_token: float | None = None  # the same with recomputation
    flops: float | None = None  # FLOPs of the whole stage, without recomputation
    checkpointing: str = ""  # the `activation_checkpointing` that is planned for
    placed: list[Placed] = field(default_factory=list)  # each possible place of the teacher
    taken: str = ""  # name of the one that the stage would choose; empty if none fits or the GPU is not known
    cost: Cost | None = None  # cost with that choice
    idle: bool = False  # whether it spends no GPU time
    too_large: bool = False  # whether it is known not to fit, so that it has no time
    memory: dict[str, int] = field(default_factory=dict)  # bytes of one rank by part, for a stage that trains nothing
    # bytes by what they are: `data`, `model`, `checkpoints` (at most, at one time), `one checkpoint`
    disk: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what is not known, does not fit, or is left out

    @property
    def chosen(self) -> Placed | None:
        """The place that the stage would choose."""
        return next((one for one in self.placed if one.name == self.taken), None)


def cost_of(seconds: float, gpus: PlannedGpus) -> Cost:
    """Hours, GPU-hours and price of a number of seconds."""
    gpu_hours = seconds / 3600 * gpus.count
    return Cost(seconds / 3600, gpu_hours, None if gpus.price is None else gpu_hours * gpus.price)


@dataclass(frozen=True)
class Untimed:
    """Names of the stages that have no time, by reason."""

    idle: tuple[str, ...]  # they spend no GPU time, so a total is complete without them
    unknown: tuple[str, ...]  # their time is not known
    too_large: tuple[str, ...]  # they do not fit


def untimed(plans: list[StagePlan]) -> Untimed:
    """Which stages have no time, and why."""
    without = [plan for plan in plans if plan.cost is None]
    return Untimed(
        idle=tuple(plan.name for plan in without if plan.idle),
        unknown=tuple(plan.name for plan in without if not plan.idle and not plan.too_large),
        too_large=tuple(plan.name for plan in without if plan.too_large),
    )


def known_cost(plans: list[StagePlan], gpus: PlannedGpus) -> Cost:
    """Cost of those stages whose cost is known."""
    known = [plan.cost for plan in plans if plan.cost is not None]
    hours = sum(cost.hours for cost in known)
    gpu_hours = sum(cost.gpu_hours for cost in known)
    return Cost(hours, gpu_hours, None if gpus.price is None else gpu_hours * gpus.price)


def total_cost(plans: list[StagePlan], gpus: PlannedGpus) -> Cost | None:
    """Cost of the whole run; None if a stage that uses GPUs does not fit or has no known time."""
    lacking = untimed(plans)
    return None if lacking.unknown or lacking.too_large or gpus.kind is None else known_cost(plans, gpus)


def as_dict(plans: list[StagePlan], gpus: PlannedGpus, assumptions: list[str]) -> dict[str, Any]:
    """All numbers, for `--json`: bytes, seconds, FLOPs and hours without prefixes."""
    stages, total = [], total_cost(plans, gpus)
    for plan in plans:
        found = asdict(plan)
        for own, one in zip(found["placed"], plan.placed, strict=True):
            own["traffic"]["within_node"] = one.traffic.within_node
            if one.time is not None:
                own["time"] |= {"seconds": one.time.seconds, "overlapped": one.time.overlapped}
        stages.append(found)
    return {
        "gpus": gpus.count,
        "gpus_per_node": gpus.per_node,
        "nodes": gpus.nodes,
        "gpu": None if gpus.kind is None else gpus.kind.model_dump(),
        "efficiency": None if gpus.kind is None else asdict(gpus.efficiency),
        "price_per_gpu_hour": gpus.price,
        "stages": stages,
        "total": None if total is None else asdict(total),
        "without_time": None if gpus.kind is None else asdict(untimed(plans)),
        "assumptions": assumptions,
    }

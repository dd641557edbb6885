"""`minima plan`: a recipe, and the GPUs that it is planned for. No torch."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minima.errors import RecipeError
from minima.planning.hardware import find_gpu
from minima.planning.plan_text import assumptions, render
from minima.planning.run_plan import PlannedGpus, as_dict
from minima.planning.throughput import Efficiency, measured_efficiency
from minima.recipe.loading import load_recipe
from minima.recipe.schema import Recipe
from minima.stages.known_inputs import KnownInputs
from minima.stages.plan_walk import plan_run
from minima.stages.shipped import find_recipe, shipped_folder


@dataclass(frozen=True)
class PlanOptions:
    """What the command line asks to plan for; None for what it does not say.

    Attributes:
        gpus: of the whole run; the recipe's ranks when not given.
        gpu: a name of `planning.hardware.GPUS`, or a YAML file.
        gpus_per_node: of one machine; what the GPU's vendor builds, or 8, when not given.
        price: of one GPU-hour.
        efficiency: share of the peak that a step executes; measured, or assumed, when not given.
        host_memory: bytes of one machine.
        benchmarks: a folder of results of `tools/bench_distil.py`.
        gpu_memory: bytes of one GPU, instead of what is published.
        gpu_flops: FLOP/s in bfloat16, likewise.
        network_bandwidth: bytes/s of one GPU to other machines, likewise.
    """

    gpus: int | None = None
    gpu: str | None = None
    gpus_per_node: int | None = None
    price: float | None = None
    efficiency: float | None = None
    host_memory: float | None = None
    benchmarks: Path | None = None
    gpu_memory: float | None = None
    gpu_flops: float | None = None
    network_bandwidth: float | None = None


def gpus_for(recipe: Recipe, recipe_path: Path, options: PlanOptions) -> PlannedGpus:
    """What the command line asks to plan for.

    Args:
        recipe: the run; says how many ranks where `options.gpus` does not.
        recipe_path: its file.
        options: of the command line.

    Raises:
        RecipeError: no such GPU, no GPUs, or a number that cannot be.
    """
    _check(options)
    kind = None
    if options.gpu is not None:
        kind = find_gpu(
            options.gpu,
            memory_bytes=options.gpu_memory,
            peak_flops=options.gpu_flops,
            network_bandwidth=options.network_bandwidth,
        )
    share = Efficiency()
    if options.efficiency is not None:
        share = Efficiency(options.efficiency, "as --efficiency says")
    elif kind is not None:
        folder = shipped_folder("benchmarks") if options.benchmarks is None else options.benchmarks
        share = measured_efficiency(kind, sorted(folder.glob("**/*.json"))) or share
    per_node = 8 if kind is None else kind.gpus_per_node
    return PlannedGpus(
        count=KnownInputs(recipe, recipe_path).ranks if options.gpus is None else options.gpus,
        per_node=per_node if options.gpus_per_node is None else options.gpus_per_node,
        kind=kind,
        efficiency=share,
        price=options.price,
        host_bytes=None if options.host_memory is None else int(options.host_memory),
    )


def _check(options: PlanOptions) -> None:
    """Refuse what would not be used, and numbers that cannot be."""
    of_a_kind = ("gpu_memory", "gpu_flops", "network_bandwidth", "price", "efficiency")
    given = ["--" + name.replace("_", "-") for name in of_a_kind if getattr(options, name) is not None]
    if options.gpu is None and given:
        raise RecipeError(
            f"{', '.join(given)} without --gpu",
            "no time is computed for GPUs of no kind, so it would not be used",
            "add --gpu with a name or a YAML file",
        )
    efficiency, memory = options.efficiency, options.host_memory
    if efficiency is not None and not 0 < efficiency <= 1:
        raise RecipeError(f"--efficiency {efficiency:g}", "it is a share of the peak", "give a number above 0, up to 1")
    if memory is not None and not 1 <= memory < math.inf:
        raise RecipeError(f"--host-memory {memory:g}", "it is the memory of one machine", "give a number of bytes")


def plan_command(
    name: str, overrides: list[str], options: PlanOptions, stages: Sequence[str] | None = None, as_json: bool = False
) -> str:
    """What `minima plan` prints.

    Args:
        name: of the recipe, or its path.
        overrides: of the recipe.
        options: what to plan for.
        stages: those to show and to add up; all when not given.
        as_json: all numbers, for programs.

    Raises:
        MinimaError: as `plan_run` and `gpus_for` do.
    """
    path = find_recipe(name)
    recipe = load_recipe(path, overrides)
    shown = {stage.name for stage in recipe.select(stages)}
    gpus = gpus_for(recipe, path, options)
    plans = [plan for plan in plan_run(recipe, path, gpus) if plan.name in shown]
    notes = assumptions(gpus)
    if as_json:
        return json.dumps(as_dict(plans, gpus, notes), indent=2)
    return render(plans, gpus, notes)

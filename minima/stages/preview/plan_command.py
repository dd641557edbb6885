"""`minima plan`: plans a recipe for given GPUs. No torch."""

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
from minima.stages.preview.known_inputs import KnownInputs
from minima.stages.preview.plan_walk import plan_run
from minima.stages.shipped import find_recipe, shipped_folder


@dataclass(frozen=True)
class PlanOptions:
    """The options of `minima plan`; None for those that are not given."""

    gpus: int | None = None  # number of GPUs of the whole run; None for the recipe's ranks
    gpu: str | None = None  # a name in `planning.hardware.GPUS`, or a YAML file
    gpus_per_node: int | None = None  # GPUs of one machine; None for the vendor's usual number, or 8
    price: float | None = None  # of one GPU-hour
    efficiency: float | None = None  # fraction of the peak that a step achieves; if None, measured or assumed
    host_memory: float | None = None  # bytes of one machine
    benchmarks: Path | None = None  # a folder of results of `tools/bench_distil.py`
    gpu_memory: float | None = None  # bytes of one GPU, instead of the published value
    gpu_flops: float | None = None  # FLOP/s in bfloat16, instead of the published value
    network_bandwidth: float | None = None  # bytes/s from one GPU to other machines, instead of the published value


def gpus_for(recipe: Recipe, recipe_path: Path, options: PlanOptions) -> PlannedGpus:
    """The GPUs that the command line asks to plan for.

    Raises:
        RecipeError: there is no such GPU, no GPU at all, or a number is impossible.
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
    """Refuse options that would have no effect, and impossible numbers."""
    of_a_kind = ("gpu_memory", "gpu_flops", "network_bandwidth", "price", "efficiency")
    given = ["--" + name.replace("_", "-") for name in of_a_kind if getattr(options, name) is not None]
    if options.gpu is None and given:
        raise RecipeError(
            f"{', '.join(given)} without --gpu",
            "without a kind of GPU no time is computed, so it would have no effect",
            "add --gpu with a name or a YAML file",
        )
    efficiency, memory = options.efficiency, options.host_memory
    if efficiency is not None and not 0 < efficiency <= 1:
        raise RecipeError(
            f"--efficiency {efficiency:g}", "it is a fraction of the peak", "give a number above 0, up to 1"
        )
    if memory is not None and not 1 <= memory < math.inf:
        raise RecipeError(f"--host-memory {memory:g}", "it is the memory of one machine", "give a number of bytes")


def plan_command(
    name: str, overrides: list[str], options: PlanOptions, stages: Sequence[str] | None = None, as_json: bool = False
) -> str:
    """The output of `minima plan`.

    Args:
        name: of the recipe, or its path.
        stages: the stages to show and to add up; None for all.
        as_json: return all numbers as JSON instead of text.

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

"""`minima plan`: a recipe, and the GPUs that it is planned for. No torch."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minima.errors import RecipeError
from minima.planning.hardware import find_gpu
from minima.planning.plan_text import assumptions, render
from minima.planning.run_plan import Cluster, as_dict
from minima.planning.throughput import Efficiency, measured_efficiency
from minima.recipe.loading import load_recipe
from minima.recipe.schema import Recipe
from minima.stages.plan_walk import plan_run
from minima.stages.preview_inputs import KnownInputs
from minima.stages.shipped import find_recipe, shipped_folder


def cluster_for(
    recipe: Recipe,
    recipe_path: Path,
    *,
    gpus: int | None = None,
    gpu: str | None = None,
    gpus_per_node: int | None = None,
    price: float | None = None,
    efficiency: float | None = None,
    host_memory: float | None = None,
    benchmarks: Path | None = None,
    gpu_memory: float | None = None,
    gpu_flops: float | None = None,
    network_bandwidth: float | None = None,
) -> Cluster:
    """What the command line asks to plan for.

    Args:
        recipe: the run; says how many ranks where `gpus` does not.
        recipe_path: its file.
        gpus: of the whole run.
        gpu: a name of `planning.hardware.GPUS`, or a YAML file.
        gpus_per_node: of one machine; what the GPU's vendor builds, or 8, when not given.
        price: of one GPU-hour.
        efficiency: share of the peak that a step executes; measured, or assumed, when not given.
        host_memory: bytes of one machine.
        benchmarks: a folder of results of `tools/bench_distil.py`.
        gpu_memory: bytes of one GPU, instead of what is published.
        gpu_flops: FLOP/s in bfloat16, likewise.
        network_bandwidth: bytes/s of one GPU to other machines, likewise.

    Raises:
        RecipeError: no such GPU, no GPUs, or a number that cannot be.
    """
    flags = {"--gpu-memory": gpu_memory, "--gpu-flops": gpu_flops, "--network-bandwidth": network_bandwidth}
    flags |= {"--price": price, "--efficiency": efficiency}
    given = [flag for flag, value in flags.items() if value is not None]
    if gpu is None and given:
        raise RecipeError(
            f"{', '.join(given)} without --gpu",
            "no time is computed for GPUs of no kind, so it would not be used",
            "add --gpu with a name or a YAML file",
        )
    if efficiency is not None and not 0 < efficiency <= 1:
        raise RecipeError(f"--efficiency {efficiency:g}", "it is a share of the peak", "give a number above 0, up to 1")
    if host_memory is not None and not 1 <= host_memory < math.inf:
        raise RecipeError(f"--host-memory {host_memory:g}", "it is the memory of one machine", "give a number of bytes")
    changes = {"memory_bytes": gpu_memory, "peak_flops": gpu_flops, "network_bandwidth": network_bandwidth}
    kind = None if gpu is None else find_gpu(gpu, **changes)
    share = Efficiency()
    if efficiency is not None:
        share = Efficiency(efficiency, "as --efficiency says")
    elif kind is not None:
        folder = shipped_folder("benchmarks") if benchmarks is None else benchmarks
        share = measured_efficiency(kind, sorted(folder.glob("**/*.json"))) or share
    return Cluster(
        gpus=KnownInputs(recipe, recipe_path).ranks if gpus is None else gpus,
        gpus_per_node=gpus_per_node if gpus_per_node is not None else kind.gpus_per_node if kind is not None else 8,
        gpu=kind,
        efficiency=share,
        price=price,
        host_bytes=None if host_memory is None else int(host_memory),
    )


def plan_command(
    name: str, overrides: list[str], stages: Sequence[str] | None = None, as_json: bool = False, **asked: Any
) -> str:
    """What `minima plan` prints.

    Args:
        name: of the recipe, or its path.
        overrides: of the recipe.
        stages: those to show and to add up; all when not given.
        as_json: all numbers, for programs.
        asked: what `cluster_for` takes.

    Raises:
        MinimaError: as `plan_run` and `cluster_for` do.
    """
    path = find_recipe(name)
    recipe = load_recipe(path, overrides)
    shown = {stage.name for stage in recipe.select(stages)}
    cluster = cluster_for(recipe, path, **asked)
    plans = [plan for plan in plan_run(recipe, path, cluster) if plan.name in shown]
    notes = assumptions(cluster)
    if as_json:
        return json.dumps(as_dict(plans, cluster, notes), indent=2)
    return render(plans, cluster, notes)

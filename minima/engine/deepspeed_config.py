"""DeepSpeed's configuration: a JSON for sharding and communication, plus what the recipe owns."""

import json
import logging
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minima.engine.deepspeed_keys import (
    AIO,
    DEVICES,
    MONITORS,
    NUMBERS,
    OFFLOAD,
    RECIPE_OWNS,
    TENSOR_PARALLEL,
    TOP,
    ZERO,
)
from minima.errors import DeepSpeedConfigError
from minima.models.shape import ModelShape
from minima.planning.sharding import Sharding, gathered_ahead
from minima.recipe.distillation import Offload, Placement
from minima.recipe.overrides import nearest
from minima.recipe.training import Training

logger = logging.getLogger(__name__)

# Our defaults. DeepSpeed's own log lines are off unless the JSON asks for them, since the loop logs.
_DEFAULTS = {
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": 2**31,
    "communication_data_type": "fp32",
    # It synchronises with the device at every micro-step; the loop measures tokens per second itself.
    "timers": {"throughput": {"enabled": False}},
}


def read_deepspeed_json(path: Path, placement: Placement = "zero3", offload: Offload | None = None) -> dict[str, Any]:
    """Read a DeepSpeed JSON; it may only set sharding, offload, communication, profiling and logging.

    Args:
        path: the file.
        placement: the placement it must fit: stage 3 where weights are sharded, stage 0 where they are whole or split.
        offload: where shards must lie; if not given, the JSON decides, but NVMe is refused.

    Raises:
        DeepSpeedConfigError: it cannot be read, sets what the recipe owns or what may change a result, or does not fit
            the placement.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise DeepSpeedConfigError(
            f"{path} cannot be read as JSON: {error}", "it configures DeepSpeed", "fix or replace the file"
        ) from error
    if not isinstance(config, dict):
        raise DeepSpeedConfigError(
            f"{path} holds a {type(config).__name__}, not an object with keys",
            "it configures DeepSpeed",
            'write {"zero_optimization": {"stage": 3, ...}}',
        )
    _check_blocks(path, config)
    _check_keys(path, config)
    _check_values(path, config)
    _check_placement(path, config, placement, offload)
    return config


def _check_placement(path: Path, config: dict[str, Any], placement: Placement, offload: Offload | None) -> None:
    zero = _block(config, "zero_optimization")
    unsupported = ["mics_shard_size"] if "mics_shard_size" in zero else []
    unsupported += ["zero_hpz_partition_size"] if zero.get("zero_hpz_partition_size", 1) != 1 else []
    unsupported += ["an optimiser offloaded to nvme"] if _device(zero, "offload_optimizer") == "nvme" else []
    unsupported += ["offload to nvme"] if offload is None and _device(zero, "offload_param") == "nvme" else []
    if unsupported:
        raise DeepSpeedConfigError(
            f"{path} asks for {', '.join(unsupported)}",
            "each rank reads its own part of a tensor, and would then hold another part, or none in memory",
            "remove it. Sharding over all ranks and offload to the CPU are supported; for a teacher, also placement "
            "zero3_node and offload nvme",
        )
    stage = 3 if placement in ("zero3", "zero3_node") else 0
    if zero.get("stage") != stage:
        raise DeepSpeedConfigError(
            f"{path} does not set zero_optimization.stage to {stage}",
            "models are loaded straight into ZeRO-3's shards, so that no rank ever holds a whole one"
            if stage
            else f"with placement {placement} weights are not sharded by ZeRO",
            f'set "zero_optimization": {{"stage": {stage}, ...}}, or choose another placement',
        )
    if ("tensor_parallel" in config) != (placement == "tensor_parallel"):
        raise DeepSpeedConfigError(
            f"{path} {'sets' if 'tensor_parallel' in config else 'lacks'} tensor_parallel",
            f"the block is for placement tensor_parallel only, and the placement here is {placement}",
            'set that placement and write "tensor_parallel": {}, or do neither',
        )
    if offload is not None and _device(zero, "offload_param") != offload:
        raise DeepSpeedConfigError(
            f"{path} offloads parameters to {_device(zero, 'offload_param')}, but the recipe's teacher to {offload}",
            "with two owners one silently loses",
            "make both the same, or leave `deepspeed` out of the recipe's teacher",
        )


def _check_values(path: Path, config: dict[str, Any]) -> None:
    zero = _block(config, "zero_optimization")
    found = [
        (f"zero_optimization.{key}", zero[key], "a number of at least 0")
        for key in NUMBERS
        if key in zero and not _is_size(zero[key])
    ]
    for block in ("offload_param", "offload_optimizer"):
        given = _block(zero, block)
        if (device := given.get("device") or "none") not in DEVICES:
            found.append((f"zero_optimization.{block}.device", device, f"one of {', '.join(DEVICES)}"))
        for key in ("buffer_count", "buffer_size", "max_in_cpu"):
            if key in given and not _is_size(given[key]):
                found.append((f"zero_optimization.{block}.{key}", given[key], "a number of at least 0"))
    if found:
        raise DeepSpeedConfigError(
            f"{path} sets " + "; ".join(f"{key} to {value!r}" for key, value, _ in found),
            "DeepSpeed would refuse it only after the ranks have started, or accept it and misbehave",
            "; ".join(f"give {key} {wanted}" for key, _, wanted in found),
        )


def _is_size(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _check_monitors(path: Path, config: dict[str, Any]) -> None:
    """Refuse monitors whose package is missing. Checked when the engine is made: a plan may be for other machines."""
    for key, package in MONITORS.items():
        monitor = config.get(key)
        if isinstance(monitor, dict) and monitor.get("enabled") and find_spec(package) is None:
            raise DeepSpeedConfigError(
                f"{path} enables {key}, but {package} is not installed",
                "DeepSpeed would abort the run at its start",
                f"pip install {package} on every machine, or remove {key}: minima writes metrics of its own",
            )


def _idle(config: dict[str, Any]) -> list[str]:
    """Keys that DeepSpeed uses only in a training step."""
    found = ["offload_optimizer"] if _device(_block(config, "zero_optimization"), "offload_optimizer") != "none" else []
    profiler = config.get("flops_profiler")
    return found + (["flops_profiler"] if isinstance(profiler, dict) and profiler.get("enabled") else [])


def _device(zero: dict[str, Any], block: str) -> str:
    return _block(zero, block).get("device") or "none"


def _check_blocks(path: Path, config: dict[str, Any]) -> None:
    zero = config.get("zero_optimization")
    inner = zero if isinstance(zero, dict) else {}
    blocks = {name: config.get(name) for name in ("zero_optimization", "tensor_parallel", "aio")}
    blocks |= {name: inner.get(name) for name in ("offload_param", "offload_optimizer")}
    for name, block in blocks.items():
        if block is not None and not isinstance(block, dict):
            raise DeepSpeedConfigError(
                f"{path} sets {name} to {block!r}",
                "DeepSpeed expects a block of keys there",
                f'write "{name}": {{...}}',
            )


def _check_keys(path: Path, config: dict[str, Any]) -> None:
    owned = [key for key in RECIPE_OWNS if key in config]
    if owned:
        raise DeepSpeedConfigError(
            f"{path} sets {', '.join(owned)}",
            "the recipe owns batch, clipping, precision, optimiser and schedule; with two owners one silently loses",
            f"remove {'it' if len(owned) == 1 else 'them'} from the JSON and set the stage's keys in the recipe: "
            + "; ".join(f"{key} is {RECIPE_OWNS[key]}" for key in owned),
        )
    zero = _block(config, "zero_optimization")
    blocks = [("", config, (*TOP, *RECIPE_OWNS)), ("zero_optimization.", zero, ZERO)]
    blocks += [("tensor_parallel.", _block(config, "tensor_parallel"), TENSOR_PARALLEL)]
    blocks += [("aio.", _block(config, "aio"), AIO)]
    for name in ("offload_param", "offload_optimizer"):
        blocks.append((f"zero_optimization.{name}.", _block(zero, name), OFFLOAD))
    unknown = [
        f"{prefix}{key} ({value!r}{nearest(key, list(known))})"
        for prefix, block, known in blocks
        for key, value in block.items()
        if key not in known
    ]
    if unknown:
        raise DeepSpeedConfigError(
            f"{path} sets {', '.join(unknown)}, which is not among the sharding, offload, communication, profiling and "
            "logging keys that are known not to change results",
            "the JSON may be edited in the middle of a run, so nothing in it may change a number",
            f"remove {'it' if len(unknown) == 1 else 'them'}, or correct the spelling",
        )


def _block(config: dict[str, Any], key: str) -> dict[str, Any]:
    """The block of keys under `key`; empty if there is none."""
    return config.get(key) or {}


def training_config(path: Path, training: Training, world_size: int, shape: ModelShape | None = None) -> dict[str, Any]:
    """The complete configuration of a trainable engine.

    Args:
        path: a DeepSpeed JSON.
        training: the stage's settings.
        world_size: number of ranks; has to divide the batch, which is checked before a run.
        shape: the model's, so that at least one layer is prefetched; if not given, the JSON decides.

    Raises:
        DeepSpeedConfigError: the JSON sets what the recipe owns.
    """
    config = read_deepspeed_json(path)
    _check_monitors(path, config)
    # DeepSpeed's default of 1e9 miscounts where layers are leaves: the embeddings would stay gathered, too.
    config["zero_optimization"].setdefault("stage3_max_reuse_distance", 0)
    if shape is not None:
        ahead = gathered_ahead(Sharding.from_json(config), shape).prefetch_elements
        config["zero_optimization"] |= {"stage3_prefetch_bucket_size": ahead}
    micro_batch = training.micro_batch_on(world_size)
    own = {
        "train_batch_size": training.batch_sequences,
        "gradient_accumulation_steps": training.batch_sequences // (world_size * micro_batch),
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_clipping": training.gradient_clip,
        "bf16": {"enabled": training.precision == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},  # ZeRO-3's default is bf16
    }
    return _DEFAULTS | config | own


def frozen_config(
    path: Path,
    *,
    precision: str,
    micro_batch_sequences: int = 1,
    placement: Placement = "zero3",
    offload: Offload | None = None,
    nvme_path: Path | None = None,
    tensor_parallel_ranks: int = 1,
) -> dict[str, Any]:
    """The complete configuration of a frozen engine: no optimiser, no accumulation.

    Args:
        path: a DeepSpeed JSON.
        precision: `float32` or `bfloat16`.
        micro_batch_sequences: sequences of one forward pass on one rank; DeepSpeed requires a value.
        placement: where the weights live.
        offload: where shards lie; if not given, the JSON decides.
        nvme_path: folder for shards on NVMe, used by this run alone.
        tensor_parallel_ranks: ranks that one copy is split over.

    Raises:
        DeepSpeedConfigError: the JSON sets what the recipe owns, or does not fit the placement.
    """
    config = read_deepspeed_json(path, placement, offload)
    _check_monitors(path, config)
    if idle := _idle(config):
        logger.info("%s: %s not used: the model is frozen and takes no optimiser step", path.name, " and ".join(idle))
    if offload == "nvme":
        zero = config["zero_optimization"]
        config["zero_optimization"] = zero | {"offload_param": zero["offload_param"] | {"nvme_path": str(nvme_path)}}
    if placement == "tensor_parallel":
        config["tensor_parallel"] = config["tensor_parallel"] | {"autotp_size": tensor_parallel_ranks}
    own = {
        "train_micro_batch_size_per_gpu": micro_batch_sequences,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": precision == "bfloat16"},
    }
    return _DEFAULTS | config | own

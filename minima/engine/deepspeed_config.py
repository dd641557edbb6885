"""DeepSpeed's configuration: a JSON for sharding and communication, and what the recipe owns added to it."""

import json
from pathlib import Path
from typing import Any

from minima.engine.deepspeed_keys import OFFLOAD, RECIPE_OWNS, TOP, ZERO
from minima.errors import DeepSpeedConfigError
from minima.recipe.overrides import nearest
from minima.recipe.training import Training

# Ours, whatever the JSON says; DeepSpeed's own lines are silent unless it asks for them, since the loop logs.
_DEFAULTS = {
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": 2**31,
    "communication_data_type": "fp32",
}


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """A DeepSpeed JSON that keeps to sharding, offload, communication and profiling.

    Raises:
        DeepSpeedConfigError: it cannot be read, sets what the recipe owns or what may change a result, or is not for
            ZeRO stage 3.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise DeepSpeedConfigError(
            f"{path} cannot be read as JSON: {error}", "DeepSpeed is configured by it", "mend or replace the file"
        ) from error
    if not isinstance(config, dict):
        raise DeepSpeedConfigError(
            f"{path} holds no keys but {type(config).__name__}",
            "DeepSpeed is configured by it",
            'write {"zero_optimization": {"stage": 3, ...}}',
        )
    _check_blocks(path, config)
    _check_keys(path, config)
    zero = _block(config, "zero_optimization")
    offloads = [_block(zero, f"offload_{what}") for what in ("param", "optimizer")]
    unsupported = ["mics_shard_size"] if "mics_shard_size" in zero else []
    unsupported += ["zero_hpz_partition_size"] if zero.get("zero_hpz_partition_size", 1) != 1 else []
    unsupported += ["offload to nvme"] if any(offload.get("device") == "nvme" for offload in offloads) else []
    if unsupported:
        raise DeepSpeedConfigError(
            f"{path} asks for {', '.join(unsupported)}",
            "each rank reads its own part of a tensor, and there it holds another part, or none in memory",
            "remove it; sharding over all ranks and offload to the CPU are supported",
        )
    if zero.get("stage") != 3:
        raise DeepSpeedConfigError(
            f"{path} does not set zero_optimization.stage to 3",
            "models are loaded straight into ZeRO-3's shards, so that no rank ever holds a whole one",
            'set "zero_optimization": {"stage": 3, ...}',
        )
    return config


def _check_blocks(path: Path, config: dict[str, Any]) -> None:
    zero = config.get("zero_optimization")
    inner = zero if isinstance(zero, dict) else {}
    blocks = {"zero_optimization": zero} | {name: inner.get(name) for name in ("offload_param", "offload_optimizer")}
    for name, block in blocks.items():
        if block is not None and not isinstance(block, dict):
            raise DeepSpeedConfigError(
                f"{path} sets {name} to {block!r}",
                "DeepSpeed reads a block of keys there",
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
            f"{path} sets {', '.join(unknown)}, which is not among the keys of sharding, offload, communication, "
            "profiling and logging that minima knows to leave results as they are",
            "the JSON may be changed in the middle of a run, so nothing in it may change a number",
            f"remove {'it' if len(unknown) == 1 else 'them'}, or mend the spelling",
        )


def _block(config: dict[str, Any], key: str) -> dict[str, Any]:
    """A block of keys; none where it is not there."""
    return config.get(key) or {}


def accumulation_steps(training: Training, world_size: int) -> int:
    """Micro-batches that each rank runs for one optimiser step.

    Raises:
        DeepSpeedConfigError: the batch does not divide by the ranks.
    """
    batch = training.batch_sequences
    if batch % world_size:
        counts = ", ".join(str(count) for count in range(1, batch + 1) if batch % count == 0)
        raise DeepSpeedConfigError(
            f"a batch of {batch} sequences does not divide by {world_size} ranks",
            "every rank has to do the same work, or the others wait and collectives no longer match",
            f"use one of {counts} ranks, or change batch_sequences",
        )
    return batch // (world_size * training.micro_batch_on(world_size))


def training_config(path: Path, training: Training, world_size: int) -> dict[str, Any]:
    """The whole configuration of a trainable engine.

    Raises:
        DeepSpeedConfigError: the JSON sets what the recipe owns, or the batch does not divide by the ranks.
    """
    return (
        _DEFAULTS
        | read_deepspeed_json(path)
        | {
            "train_batch_size": training.batch_sequences,
            "gradient_accumulation_steps": accumulation_steps(training, world_size),
            "train_micro_batch_size_per_gpu": training.micro_batch_on(world_size),
            "gradient_clipping": training.gradient_clip,
            "bf16": {"enabled": training.precision == "bfloat16"},
            "data_types": {"grad_accum_dtype": "fp32"},  # ZeRO-3 takes bf16 when it is not said
        }
    )


def frozen_config(path: Path, *, precision: str, micro_batch_sequences: int = 1) -> dict[str, Any]:
    """The whole configuration of a frozen engine: no optimiser, no accumulation.

    Args:
        path: a DeepSpeed JSON.
        precision: `float32` or `bfloat16`.
        micro_batch_sequences: sequences of one forward pass on one rank; DeepSpeed wants to be told.

    Raises:
        DeepSpeedConfigError: the JSON sets what the recipe owns.
    """
    return (
        _DEFAULTS
        | read_deepspeed_json(path)
        | {
            "train_micro_batch_size_per_gpu": micro_batch_sequences,
            "gradient_accumulation_steps": 1,
            "bf16": {"enabled": precision == "bfloat16"},
        }
    )

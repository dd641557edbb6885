"""How ZeRO-3 shards a model, as far as bytes depend on it: a model's tensors, and the sizes in a DeepSpeed JSON."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minima.errors import RecipeError
from minima.models.shape import ModelShape

BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Sharding:
    """The sizes that a DeepSpeed JSON sets; the defaults are those of DeepSpeed 0.19 (`runtime/zero/config.py`)."""

    # gradients that are reduced together; a float32 buffer of this size always exists
    reduce_bucket_elements: int = 500_000_000
    prefetch_elements: int = 50_000_000  # weights that are gathered ahead of the layer that runs
    persistence_elements: int = 100_000  # tensors of at most this many elements stay whole on every rank
    # limit of gathered weights up to which the next ones are prefetched. What the backward pass needs again is then not
    # released, so a trained model holds that many whole weights
    live_elements: int = 1_000_000_000
    # a gathered weight that is needed again within this many elements is kept until then. 0 for a trained model unless
    # the JSON sets it (`deepspeed_config.training_config`)
    reuse_elements: int = 1_000_000_000
    sub_group_elements: int = 1_000_000_000  # shard elements that one call of the optimiser updates
    offload_optimizer: bool = False  # whether master weights, moments and gradients lie in host memory
    offload_weights: str = "none"  # where shards of the weights lie: `none`, `cpu` or `nvme`
    pinned: bool = False  # whether the host memory that holds them is page-locked
    nvme_buffers: int = 5  # buffers in host memory through which weights on NVMe travel
    nvme_buffer_elements: int = 100_000_000  # size of one of them

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "Sharding":
        """Read the sizes from the content of a DeepSpeed JSON, or from a complete configuration made from one."""
        zero = config.get("zero_optimization") or {}
        weights, optimizer = zero.get("offload_param") or {}, zero.get("offload_optimizer") or {}
        names = {
            "reduce_bucket_elements": "reduce_bucket_size",
            "prefetch_elements": "stage3_prefetch_bucket_size",
            "persistence_elements": "stage3_param_persistence_threshold",
            "live_elements": "stage3_max_live_parameters",
            "reuse_elements": "stage3_max_reuse_distance",
            "sub_group_elements": "sub_group_size",
        }
        given: dict[str, Any] = {field: int(zero[name]) for field, name in names.items() if name in zero}
        for field, name in (("nvme_buffers", "buffer_count"), ("nvme_buffer_elements", "buffer_size")):
            if name in weights:
                given[field] = int(weights[name])
        return cls(
            offload_optimizer=optimizer.get("device", "none") != "none",
            offload_weights=str(weights.get("device", "none")),
            pinned=bool(weights.get("pin_memory") or optimizer.get("pin_memory")),
            **given,
        )


def read_sharding(path: Path) -> Sharding:
    """Read the sizes in a DeepSpeed JSON.

    Raises:
        RecipeError: it cannot be read.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return Sharding.from_json(config)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"{path} cannot be read as a DeepSpeed JSON: {error}", "it configures DeepSpeed", "fix the file"
        ) from None


# The sizes in `ds_configs/student_zero3.json` and `teacher_zero3*.json`, for use without the files.
STUDENT = Sharding(50_000_000, 50_000_000, 1000, 1_000_000_000, 0, 100_000_000)
TEACHER = Sharding(
    prefetch_elements=250_000_000, persistence_elements=1000, live_elements=2_000_000_000, reuse_elements=0
)


def gathered_ahead(sharding: Sharding, shape: ModelShape) -> Sharding:
    """The sizes with which a model trains: layers are gathered as a whole, so at least one layer is prefetched.

    A JSON that prefetches nothing is left as it is.
    """
    if not sharding.prefetch_elements:
        return sharding
    return replace(sharding, prefetch_elements=max(sharding.prefetch_elements, shape.layer_parameters))


def layer_tensors(shape: ModelShape) -> list[int]:
    """Elements of each parameter of one decoder layer."""
    width, neurons = shape.hidden_size, shape.intermediate_size
    query, key_value = shape.num_heads * shape.head_size, shape.num_key_value_heads * shape.head_size
    if shape.family in ("gpt_neox", "gpt2"):  # one fused projection; biases everywhere; norms with a bias
        attention = [3 * width * width, 3 * width, width * width, width]
        return [*attention, width * neurons, neurons, neurons * width, width, *[width] * 4]
    tensors = [width * query, width * key_value, width * key_value, query * width, *[width * neurons] * 3, width, width]
    if shape.family == "qwen2" or (shape.attention_bias and shape.family in ("llama", "qwen3")):
        tensors += [query, key_value, key_value]
        tensors += [] if shape.family == "qwen2" else [width]
    if shape.family == "llama" and shape.mlp_bias:
        tensors += [neurons, neurons, width]
    if shape.family == "qwen3":
        tensors += [shape.head_size] * 2
    return tensors


def outer_tensors(shape: ModelShape) -> list[int]:
    """Elements of each parameter outside the layers: embeddings, the final norm, an untied head."""
    width, table = shape.hidden_size, shape.vocabulary_size * shape.hidden_size
    positions = [shape.max_positions * width] if shape.family == "gpt2" else []
    norm = [width] * (2 if shape.family in ("gpt_neox", "gpt2") else 1)
    return [table, *positions, *norm, *([] if shape.tied else [table])]


def tensors(shape: ModelShape) -> list[int]:
    """Elements of each parameter of a model; a tied head counts once."""
    return outer_tensors(shape) + layer_tensors(shape) * shape.num_layers


def shard_elements(shape: ModelShape, ranks: int) -> int:
    """Elements that each of `ranks` ranks holds: an equal part of every tensor, rounded up."""
    return sum(-(-size // ranks) for size in tensors(shape))


def persistent_elements(shape: ModelShape, sharding: Sharding) -> int:
    """Elements of the tensors that stay whole on every rank."""
    return sum(size for size in tensors(shape) if size <= sharding.persistence_elements)

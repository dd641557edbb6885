"""A stock model from its configuration alone. No forked modelling code."""

import copy
import functools
import json
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def stock_config(config: dict[str, Any]) -> PretrainedConfig:
    """The transformers configuration object of a `config.json`'s content."""
    fields = copy.deepcopy(config)
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def build_empty(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A stock model whose weights are still to be filled in, on the current default device.

    Args:
        config: content of a `config.json`.
        dtype: of every parameter.
    """
    return AutoModelForCausalLM.from_config(stock_config(config), dtype=dtype, attn_implementation="sdpa")


def parameter_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the stock model that `config` describes, in its order."""
    return _parameter_shapes(json.dumps(config, sort_keys=True, default=str))


@functools.lru_cache(maxsize=16)
def _parameter_shapes(config_json: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = build_empty(json.loads(config_json))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

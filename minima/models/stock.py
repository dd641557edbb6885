"""Stock models built from a configuration alone, without forked modelling code."""

import copy
import functools
import json
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from minima.models.attention import attention_implementation

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def stock_config(config: dict[str, Any]) -> PretrainedConfig:
    """The transformers configuration object for the content of a `config.json`."""
    fields = copy.deepcopy(config)
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def build_empty(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build a stock model with uninitialised weights on the current default device.

    The padding token is removed: if a configuration pads with the end token, `nn.Embedding` would never train its row.
    Dropout is set to 0, whatever the configuration says: with it, a step's result would depend on how the batch is
    divided among ranks.

    Args:
        config: content of a `config.json`.
        dtype: of every parameter.
    """
    fields = {name: value for name, value in config.items() if name != "pad_token_id"}
    stock = stock_config(fields)
    for name in stock.to_dict():
        if name.endswith(("dropout", "_pdrop")):
            setattr(stock, name, 0.0)
    with no_init_weights():  # every weight is filled in later, and under ZeRO-3 none could be initialised here
        model = AutoModelForCausalLM.from_config(
            stock, dtype=dtype, attn_implementation=attention_implementation(stock)
        )
    model.tie_weights()
    return model


def architecture(config: dict[str, Any]) -> str:
    """Name of the stock model class, from which other programs that read a `config.json` choose theirs."""
    stock_class: Any = AutoModelForCausalLM._model_mapping[type(stock_config(config))]
    return stock_class.__name__


def parameter_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the stock model that `config` describes, in the model's order."""
    return _parameter_shapes(json.dumps(config, sort_keys=True, default=str))


@functools.lru_cache(maxsize=16)
def _parameter_shapes(config_json: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = build_empty(json.loads(config_json))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

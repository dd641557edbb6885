"""Small stock models of every family, with weights (biases and norms too) that are random throughout."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from minima.models.shape import ModelShape
from minima.models.stock import build_empty
from minima.models.weights import MemorySource

SHAPES: dict[str, ModelShape] = {
    "llama": ModelShape(vocabulary_size=61, hidden_size=32, intermediate_size=40, num_layers=4, num_heads=4),
    "llama-gqa": ModelShape(
        vocabulary_size=61, hidden_size=32, intermediate_size=40, num_layers=3, num_heads=8, num_key_value_heads=4
    ),
    "llama-tied-biased": ModelShape(
        vocabulary_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_layers=2,
        num_heads=4,
        num_key_value_heads=2,
        tied=True,
        attention_bias=True,
        mlp_bias=True,
    ),
    "mistral": ModelShape(
        family="mistral",
        vocabulary_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_layers=2,
        num_heads=6,
        num_key_value_heads=3,
        head_size=8,
    ),
    "qwen2": ModelShape(
        family="qwen2",
        vocabulary_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_layers=3,
        num_heads=8,
        num_key_value_heads=4,
        tied=True,
    ),
    "qwen3": ModelShape(
        family="qwen3",
        vocabulary_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_layers=2,
        num_heads=8,
        num_key_value_heads=4,
        head_size=8,
        norm_epsilon=1e-2,  # large, so that a wrong epsilon of the query and key norms shows
    ),
    "gpt_neox": ModelShape(
        family="gpt_neox", vocabulary_size=61, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4
    ),
    "gpt_neox-sequential": ModelShape(
        family="gpt_neox", vocabulary_size=61, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4
    ),
    "gpt2": ModelShape(
        family="gpt2",
        vocabulary_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_layers=3,
        num_heads=4,
        max_positions=64,
        tied=True,
    ),
}


class Small:
    """A small model, its shape and its weights."""

    def __init__(self, name: str, seed: int = 0) -> None:
        self.name, self.shape = name, SHAPES[name]
        config = self.shape.to_config() | {"use_parallel_residual": not name.endswith("sequential")}
        self.model: PreTrainedModel = build_empty(config).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for parameter_name, parameter in self.model.named_parameters():
            parameter.normal_(0, 0.2, generator=generator)
            if parameter.dim() == 1 and "norm" in parameter_name and parameter_name.endswith("weight"):
                parameter.add_(1)
        self.source = MemorySource(config, {name: tensor.clone() for name, tensor in self.model.named_parameters()})
        self.ids_BT = torch.randint(0, 61, (2, 9), generator=generator)

    def logits(self) -> torch.Tensor:
        return self.model(input_ids=self.ids_BT, use_cache=False).logits


@pytest.fixture
def small() -> Callable[[str], Small]:
    return Small


@pytest.fixture(params=list(SHAPES))
def any_small(request: pytest.FixtureRequest) -> Small:
    return Small(request.param)

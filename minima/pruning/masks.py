"""Masks over heads, neurons and width, as hooks on one stock model.

Shapes: L layers, K key-value groups of a layer, I neurons of a layer, D width, B batch, T sequence.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from minima.models.families import Family, family_of
from minima.models.shape import ModelShape


class Masks:
    """One number for each key-value group, neuron and hidden dimension, to multiply activations by.

    They are float32 leaves and take the activations' dtype where they multiply: what autograd sums up over the many
    places of the hidden mask is then float32 in a bfloat16 model too.

    Attributes:
        head_LK: multiplies the input of the attention's output projection, group by group.
        neuron_LI: multiplies the input of the MLP's last matrix.
        hidden_D: one vector for the whole model; multiplies what the embeddings, each attention block and each MLP
            block add to the residual stream.
    """

    def __init__(self, shape: ModelShape, device: torch.device | str = "cpu") -> None:
        self.shape = shape
        self.head_LK = torch.ones(shape.num_layers, shape.num_key_value_heads, device=device, requires_grad=True)
        self.neuron_LI = torch.ones(shape.num_layers, shape.intermediate_size, device=device, requires_grad=True)
        self.hidden_D = torch.ones(shape.hidden_size, device=device, requires_grad=True)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three masks."""
        return self.head_LK, self.neuron_LI, self.hidden_D

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Hook the masks into `model` until the context ends.

        It has to span the backward pass too: activation checkpointing runs the forward pass again there.

        Args:
            model: a stock causal language model of this shape, whole or partitioned by ZeRO-3: the hooks touch
                activations only, never parameters.
        """
        family = family_of(self.shape.family)
        group_width = self.shape.num_heads // self.shape.num_key_value_heads * self.shape.head_size
        with ExitStack() as stack:

            def before(module: nn.Module, mask_LU: Tensor, number: int, inner: int) -> None:
                def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                    factor = mask_LU[number].to(inputs[0].dtype).repeat_interleave(inner)
                    return inputs[0] * factor, *inputs[1:]

                stack.callback(module.register_forward_pre_hook(hook).remove)

            def after(module: nn.Module) -> None:
                def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
                    return output * self.hidden_D.to(output.dtype)

                stack.callback(module.register_forward_hook(hook).remove)

            for path in family.embeddings:
                after(model.get_submodule(path))
            for number, layer in enumerate(_layers(model, family)):
                attention = layer.get_submodule(family.attention_output)
                mlp = layer.get_submodule(family.mlp_output)
                before(attention, self.head_LK, number, group_width)
                before(mlp, self.neuron_LI, number, 1)
                after(attention)
                after(mlp)
            yield


@contextmanager
def norms_over(model: nn.Module, shape: ModelShape, kept_dims: Tensor) -> Iterator[None]:
    """Let the norms of `model` take their statistics over the kept dimensions only, and give zeros elsewhere.

    With hidden masks that are zero outside `kept_dims`, the model then computes what the sliced model computes.

    Args:
        model: a stock causal language model, whole (its norms' weights are read).
        shape: of the model.
        kept_dims: int64 indices of the dimensions that stay.
    """
    family = family_of(shape.family)

    def hook(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        kept = inputs[0].index_select(-1, kept_dims)
        parameters = dict(norm.named_parameters())
        weight = parameters["weight"].index_select(0, kept_dims)
        if family.rms:
            kept = functional.rms_norm(kept, kept.shape[-1:], weight, shape.norm_epsilon)
        else:
            bias = parameters["bias"].index_select(0, kept_dims)
            kept = functional.layer_norm(kept, kept.shape[-1:], weight, bias, shape.norm_epsilon)
        return torch.zeros_like(output).index_copy(-1, kept_dims, kept)

    norms = [model.get_submodule(family.final_norm)]
    for layer in _layers(model, family):
        norms += [layer.get_submodule(path) for path in family.norms]
    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_hook(hook).remove)
        yield


def _layers(model: nn.Module, family: Family) -> Iterator[nn.Module]:
    return model.get_submodule(family.layers).children()

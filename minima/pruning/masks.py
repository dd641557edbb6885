"""Masks over heads, neurons and width, implemented as hooks on one stock model.

Shapes: L layers, K key-value groups of a layer, I neurons of a layer, D width, B batch, T sequence.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minima.models.families import family_of
from minima.models.shape import ModelShape


class Masks:
    """Factors for activations: one per key-value group, neuron and hidden dimension.

    They are float32 leaves that are cast to the activations' dtype when they multiply, so that autograd sums the
    gradients from the many uses of the hidden mask in float32, even in a bfloat16 model.

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

        The context must also span the backward pass, where activation checkpointing runs the forward pass again.

        Args:
            model: a stock causal language model of this shape, whole or partitioned by ZeRO-3, because the hooks
                only touch activations, never parameters.
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
            for number, layer in enumerate(model.get_submodule(family.layers).children()):
                attention = layer.get_submodule(family.attention_output)
                mlp = layer.get_submodule(family.mlp_output)
                before(attention, self.head_LK, number, group_width)
                before(mlp, self.neuron_LI, number, 1)
                after(attention)
                after(mlp)
            yield

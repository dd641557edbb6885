"""Linear layers of one model instance that multiply with `cpu_products`; no library class or module is patched."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minima import cpu_products


def use_cpu_products(model: PreTrainedModel) -> None:
    """Make this instance's linear layers use the faster float32 products of `cpu_products` where it has them.

    Its parameters and their names stay the same; elsewhere nothing changes.

    Args:
        model: a stock model, whole or partitioned by ZeRO-3.
    """
    for module in model.modules():
        if type(module) is nn.Linear and cpu_products.is_faster(module.weight):
            module.__class__ = _Linear


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu") or not input.dtype == self.weight.dtype == torch.float32:
            return super().forward(input)
        return _product(input, self.weight, self.bias)


def _product(left_MK: Tensor, right_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`cpu_products.product` with autograd."""
    if not torch.is_grad_enabled():
        return cpu_products.product(left_MK, right_NK, bias_N)
    return _Product.apply(left_MK, right_NK, bias_N)


class _Product(torch.autograd.Function):
    """`inputs weight^T + bias`.

    The weight is saved as the parameter itself, whose data ZeRO-3 releases after the layer and gathers again before its
    backward pass.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        need_inputs, need_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(inputs if need_weight else None, weight_NK if need_inputs else None)
        return cpu_products.product(inputs, weight_NK, bias_N)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs, weight_NK = ctx.saved_tensors
        need_inputs, need_weight, need_bias = ctx.needs_input_grad
        grad_inputs = grad_weight_NK = grad_bias_N = None
        grad_MN = grad.reshape(-1, grad.shape[-1])
        if need_inputs:
            grad_inputs = _product(grad, weight_NK.t())
        if need_weight:
            inputs_MK = inputs.reshape(-1, inputs.shape[-1])
            (tokens, rows), columns = grad_MN.shape, inputs_MK.shape[1]
            first, second = tokens * rows, columns * (tokens + rows)  # elements that each way copies
            if first <= second:
                grad_weight_NK = _product(grad_MN.t(), inputs_MK.t())
            else:
                grad_weight_NK = _product(inputs_MK.t(), grad_MN.t()).t().contiguous()
        if need_bias:
            grad_bias_N = grad_MN.sum(0)
        return grad_inputs, grad_weight_NK, grad_bias_N

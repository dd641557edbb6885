"""Activation recomputation in a stock model's backward pass, and compilation of its decoder layers one by one."""

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from minima.cpu_products import PRODUCT

Recomputation = Literal["none", "selective", "full"]

_aten = torch.ops.aten
# Matrix products and attention, which cost the FLOPs. The rest of a layer is memory-bound and cheap to run again.
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_attention_math_for_mps.default,
    torch.ops.higher_order.flex_attention,
    PRODUCT,
}
if hasattr(torch.ops.higher_order, "inductor_compiled_code"):  # flex attention in a layer that is not compiled
    _KEPT.add(torch.ops.higher_order.inductor_compiled_code)
# One layer's code is compiled with and without gradients (held-out losses), with and without document masks, per kind
# of layer and per micro-batch size. PyTorch's default limit is 8, and compilation fails beyond the limit.
_RECOMPILE_LIMIT = 64


def decoder_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The decoder layers of a stock model, in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute(model: PreTrainedModel, what: Recomputation) -> None:
    """Choose what the backward pass of `model` recomputes, layer by layer.

    We do not use transformers' own gradient checkpointing: before 5.23 it runs a layer's hooks again during
    recomputation, and it does not work with a compiled layer.

    Args:
        model: a stock model; only this instance changes. In evaluation mode or without gradients nothing is recomputed.
        what: `none`; `selective`, everything but matrix products and attention; `full`, whole layers.
    """
    if what == "none":
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if what == "selective":
        settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_products)
    forwards = {kind: _recomputing(kind.forward, settings) for kind in {type(layer) for layer in decoder_layers(model)}}
    for layer in decoder_layers(model):
        # `forward` rather than `__call__`, so that hooks on the layer, such as ZeRO-3's, run only once.
        layer.forward = types.MethodType(forwards[type(layer)], layer)


def _recomputing(forward: Callable[..., Any], settings: dict[str, Any]) -> Callable[..., Any]:
    def forward_again(self: GradientCheckpointingLayer, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return forward(self, *args, **kwargs)
        return checkpoint(functools.partial(forward, self, **kwargs), *args, **settings)

    return forward_again


def _keep_products(_context: SelectiveCheckpointContext, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def compiled_whole(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """Compile `function` with `torch.compile` without graph breaks, for more input variants than PyTorch's default."""
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # since PyTorch 2.13
        settings |= {"recompile_limit": _RECOMPILE_LIMIT, "isolate_recompiles": True}
    else:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    return torch.compile(function, fullgraph=True, **settings)


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Compile the forward pass of each decoder layer, without the hooks on the layer itself.

    Layers of the same kind share one graph. A graph break is an error. Only this instance changes, and recomputation
    that was chosen before becomes part of the graph.

    Args:
        model: a stock model. Hooks inside a layer become part of its graph, so they must be compilable.
        backend: of `torch.compile`.
    """
    compiled: dict[Callable[..., Any], Any] = {}
    for layer in decoder_layers(model):
        forward = cast(types.MethodType, layer.forward).__func__
        if forward not in compiled:
            options = {"guard_filter_fn": _without_parameter_ids}
            compiled[forward] = compiled_whole(forward, backend=backend, dynamic=False, options=options)
        # `forward` rather than `__call__`: ZeRO-3's hooks gather the layer's weights before it and free them after it.
        layer.forward = types.MethodType(compiled[forward], layer)


def _without_parameter_ids(guards: Sequence[Any]) -> list[bool]:
    """Keep every guard except those on a parameter's ZeRO-3 id (`ds_id`), which differs in each layer.

    DeepSpeed's linear layer only checks whether there is an id, but PyTorch 2.11 guards on its value and would compile
    each layer of a deep model again.
    """
    return [not guard.name.endswith(".ds_id") for guard in guards]

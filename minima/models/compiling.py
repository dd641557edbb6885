"""What the backward pass of a stock model recomputes, and its decoder layers compiled one by one."""

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

Recomputation = Literal["none", "selective", "full"]

_aten = torch.ops.aten
# Matrix products and attention: what costs FLOPs. All else of a layer is bound by memory, and cheap to run again.
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
}
if hasattr(torch.ops.higher_order, "inductor_compiled_code"):  # flex attention in a layer that is not compiled
    _KEPT.add(torch.ops.higher_order.inductor_compiled_code)
# A compiled model meets one layer's code with gradients, without them (held-out losses), with and without walls between
# documents, per kind of layer and per size of a micro-batch. Beyond the limit, PyTorch's default of 8, it would refuse.
_RECOMPILE_LIMIT = 64


def decoder_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The repeated blocks of a stock model, in its order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute(model: PreTrainedModel, what: Recomputation) -> None:
    """Choose what the backward pass of `model` computes again, layer by layer.

    Not transformers' own gradient checkpointing: before 5.23 that runs a layer's hooks again during recomputation, and
    it cannot hold a compiled layer.

    Args:
        model: a stock model; only this instance changes. In evaluation mode, or without gradients, nothing does.
        what: `none`; `selective`, all but matrix products and attention; `full`, whole layers.
    """
    if what == "none":
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if what == "selective":
        settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_products)
    forwards = {kind: _recomputing(kind.forward, settings) for kind in {type(layer) for layer in decoder_layers(model)}}
    for layer in decoder_layers(model):
        # `forward`, not `__call__`: hooks on the layer, such as ZeRO-3's, run once.
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
    """`function` compiled with `torch.compile`, without graph breaks, for more kinds of input than PyTorch expects."""
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # from PyTorch 2.13 on
        settings |= {"recompile_limit": _RECOMPILE_LIMIT, "isolate_recompiles": True}
    else:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    return torch.compile(function, fullgraph=True, **settings)


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Compile the forward pass of each decoder layer, hooks on the layer itself left out.

    One graph serves all layers of a model that are alike. A graph break is an error, so there is none. Only this
    instance changes, and recomputation that was chosen before becomes part of the graph.

    Args:
        model: a stock model. What is hooked into the inside of a layer becomes part of its graph, and has to fit it.
        backend: of `torch.compile`.
    """
    compiled: dict[Callable[..., Any], Any] = {}
    for layer in decoder_layers(model):
        forward = cast(types.MethodType, layer.forward).__func__
        if forward not in compiled:
            options = {"guard_filter_fn": _without_parameter_ids}
            compiled[forward] = compiled_whole(forward, backend=backend, dynamic=False, options=options)
        # `forward`, not `__call__`: ZeRO-3's hooks gather the layer's weights before it and let go of them after it.
        layer.forward = types.MethodType(compiled[forward], layer)


def _without_parameter_ids(guards: Sequence[Any]) -> list[bool]:
    """Keep every guard except those on a parameter's ZeRO-3 id (`ds_id`), which differs in each layer.

    DeepSpeed's linear layer asks whether there is an id. PyTorch 2.11 guards on its value, and would compile each layer
    of a deep model anew.
    """
    return [not guard.name.endswith(".ds_id") for guard in guards]

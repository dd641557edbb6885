"""liger-kernel's norms, SwiGLUs and rotary embedding for one model instance; no library class or module is patched."""

import functools
import importlib
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minima.errors import RecipeError, UnsupportedFamily
from minima.launcher import without_gpus
from minima.models.families import family_of
from minima.triton_driver import CURE, triton_trouble

# liger-kernel's own entry points patch classes for all models of the process, and its rotary option a whole module. We
# use only its three autograd functions.
_ROTATION = "apply_rotary_pos_emb"  # the global name by which a stock attention calls it


def use_liger(model: PreTrainedModel, products_kept: bool = False) -> list[str]:
    """Make this instance's RMSNorms, SwiGLUs and rotary embedding use liger-kernel's kernels.

    Its parameters and their names stay the same.

    Args:
        model: a stock model, whole or partitioned by ZeRO-3.
        products_kept: whether the backward pass reads the projections' queries and keys again, as it does under
            selective recomputation, which keeps matrix products. liger-kernel rotates in place, so they are then
            copied first.

    Returns:
        Paths of the modules that use them.

    Raises:
        UnsupportedFamily: there is nothing to replace.
        RecipeError: liger-kernel is not installed, there is no GPU, or Triton cannot start a kernel on it.
    """
    family = family_of(model.config.model_type)
    if not family.rms:
        raise UnsupportedFamily(
            f"kernels: liger for a {family.name} model",
            "it has neither RMSNorms nor SwiGLUs, so the key would change nothing",
            "set kernels: stock; with compile: true its norms and activations are fused as well",
        )
    functions = _liger_functions()
    rotation = functools.partial(_rotate, functions.LigerRopeFunction, products_kept)
    replaced = []
    for path, module in model.named_modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = functools.partial(_rms_norm, module, functions.LigerRMSNormFunction)
        elif _is_swiglu(module, model.config):
            module.forward = functools.partial(_swiglu, module, functions.LigerSiLUMulFunction)
        elif (stock := inspect.unwrap(type(module).forward)) and _ROTATION in stock.__code__.co_names:
            module.forward = functools.partial(_forward_calling(stock, rotation), module)
        else:
            continue
        replaced.append(path)
    return replaced


def _liger_functions() -> Any:
    """liger-kernel's autograd functions."""
    try:
        functions = importlib.import_module("liger_kernel.ops")
    except ImportError as error:
        raise RecipeError(
            f"kernels: liger, but liger-kernel cannot be imported: {error}",
            "its kernels are not part of minima",
            "pip install liger-kernel on every machine, or set kernels: stock",
        ) from error
    if not _has_gpu():
        raise RecipeError(
            "kernels: liger without a GPU",
            "its kernels run on a GPU only; a CPU runs the stock modules",
            "set kernels: stock, or run this stage on a GPU",
        )
    if (trouble := triton_trouble()) is not None:
        raise RecipeError(
            f"kernels: liger, but Triton cannot start a kernel here: {trouble}",
            "its kernels are written in Triton, which compiles a small C module to launch them",
            f"{CURE}, or set kernels: stock",
        )
    return functions


def _has_gpu() -> bool:
    return torch.cuda.is_available() and not without_gpus()


def _is_swiglu(module: nn.Module, config: Any) -> bool:
    parts = all(isinstance(getattr(module, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj"))
    return parts and config.hidden_act in ("silu", "swish")


def _forward_calling(stock: Callable[..., Any], rotation: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a stock attention's forward pass that calls `rotation` instead; its module is not modified."""
    names = stock.__globals__ | {_ROTATION: rotation}
    copied = types.FunctionType(stock.__code__, names, stock.__name__, stock.__defaults__, stock.__closure__)
    copied.__kwdefaults__ = stock.__kwdefaults__
    return copied


def _rotate(
    function: Any, products_kept: bool, queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    if products_kept:
        queries, keys = queries.clone(), keys.clone()
    return function.apply(queries, keys, cos, sin)


def _rms_norm(norm: Any, function: Any, hidden: Tensor) -> Tensor:
    # Casts as Llama does: statistics in float32, the product in the activations' dtype. Not in place, because that
    # would overwrite a gradient that belongs to whoever made it, which may be the loss.
    return function.apply(hidden, norm.weight, norm.variance_epsilon, 0.0, "llama", False, None)


def _swiglu(mlp: Any, function: Any, hidden: Tensor) -> Tensor:
    return mlp.down_proj(function.apply(mlp.gate_proj(hidden), mlp.up_proj(hidden), 1.0, 1.0))

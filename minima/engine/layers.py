"""How the decoder layers of a built sharded model run: fused kernels, recomputation, compilation.

`prepare_layers(model, activation_checkpointing=..., compiled=..., kernels=...)` is called on what `build_sharded`
returns, for students and frozen models alike, after the weights are loaded and before `deepspeed.initialize`, which
reads there which modules to gather as one.
"""

from deepspeed.utils import set_z3_leaf_modules
from transformers import PreTrainedModel

from minima.errors import RecipeError
from minima.models.compiling import Recomputation, compile_layers, decoder_layers, recompute
from minima.models.kernels import use_liger
from minima.triton_driver import CURE, triton_trouble


def prepare_layers(
    model: PreTrainedModel,
    *,
    activation_checkpointing: Recomputation = "none",
    compiled: bool = False,
    kernels: str = "stock",
    backend: str = "inductor",
) -> None:
    """Set how one model's layers run. Names and parameters do not change.

    Each decoder layer is gathered as a whole (`gather_whole_layers`).

    Args:
        model: a built model, whole or sharded, that has no engine yet.
        activation_checkpointing: what the backward pass recomputes; `none` for a frozen model that only predicts.
        compiled: compile each decoder layer.
        kernels: `stock`, or `liger` for liger-kernel's norms, SwiGLUs and rotary embedding.
        backend: backend of `torch.compile`.

    Raises:
        RecipeError: liger's kernels, or compiled layers, cannot run here.
        UnsupportedFamily: the model has nothing that liger-kernel could replace.
    """
    assert not (compiled and kernels == "liger"), "the recipe refuses the two together"
    if compiled and backend == "inductor" and _on_gpu(model) and (trouble := triton_trouble()) is not None:
        raise RecipeError(
            f"compile: true, but Triton cannot start a kernel here: {trouble}",
            "the compiler writes its GPU kernels in Triton, which builds a small C module to launch them",
            f"{CURE}, or set compile: false",
        )
    if kernels == "liger":
        use_liger(model, products_kept=activation_checkpointing == "selective")
    recompute(model, activation_checkpointing)
    gather_whole_layers(model)
    if compiled:
        compile_layers(model, backend)


def gather_whole_layers(model: PreTrainedModel) -> None:
    """Make each decoder layer one leaf for ZeRO-3: its weights are gathered before the layer and released after it.

    DeepSpeed's default, hooks on every module inside the layer, takes more than a third of a step's host time
    (`tools/bench_distil.py --profile host`), and would break a compiled layer's graph.

    Args:
        model: from `build_sharded`, without an engine yet. One without decoder layers stays as it is.
    """
    if kinds := {type(layer) for layer in decoder_layers(model)}:
        set_z3_leaf_modules(model, sorted(kinds, key=lambda kind: kind.__name__))


def _on_gpu(model: PreTrainedModel) -> bool:
    return any(parameter.device.type == "cuda" for parameter in model.parameters())

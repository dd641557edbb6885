"""How the decoder layers of a built sharded model run: fused kernels, recomputation, compilation.

`prepare_layers(model, activation_checkpointing=..., compiled=..., kernels=...)` is called on what `build_sharded` gave,
student or frozen model alike, after the weights are in and before `deepspeed.initialize`: DeepSpeed reads there which
modules it gathers as one.
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
    """Choose how one model's layers run. Names and parameters stay what they are.

    Each decoder layer is gathered as a whole (`gather_whole_layers`).

    Args:
        model: from `build_sharded`, whole or sharded, its engine still to be made.
        activation_checkpointing: what the backward pass computes again; `none` for a frozen model that only predicts.
        compiled: compile each decoder layer.
        kernels: `stock`, or `liger` for liger-kernel's norms, SwiGLUs and rotary embedding.
        backend: of `torch.compile`.

    Raises:
        RecipeError: the kernels cannot run here.
        UnsupportedFamily: it has nothing that liger-kernel could replace.
    """
    assert not (compiled and kernels == "liger"), "the recipe refuses the two together"
    if compiled and backend == "inductor" and _on_gpu(model) and (trouble := triton_trouble()) is not None:
        raise RecipeError(
            f"compile: true, and Triton cannot start a kernel here: {trouble}",
            "the compiler writes its kernels for a GPU in Triton, which builds a small module in C to start them",
            f"{CURE}, or set compile: false",
        )
    if kernels == "liger":
        use_liger(model, products_kept=activation_checkpointing == "selective")
    recompute(model, activation_checkpointing)
    gather_whole_layers(model)
    if compiled:
        compile_layers(model, backend)


def gather_whole_layers(model: PreTrainedModel) -> None:
    """Make each decoder layer one leaf for ZeRO-3: its weights are gathered and let go of together, around the layer.

    Hooks on every module within it, DeepSpeed's default, take more than a third of the host's time of a step
    (`tools/bench_distil.py --profile host`), and would break a compiled layer's graph.

    Args:
        model: from `build_sharded`, its engine still to be made. One without such layers stays as it is.
    """
    if kinds := {type(layer) for layer in decoder_layers(model)}:
        set_z3_leaf_modules(model, sorted(kinds, key=lambda kind: kind.__name__))


def _on_gpu(model: PreTrainedModel) -> bool:
    return any(parameter.device.type == "cuda" for parameter in model.parameters())

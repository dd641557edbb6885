"""Translation of a pruning target into the student's shape. No torch, because the dry run uses it too."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from minima.errors import MinimaError, ShapeError
from minima.models.families import family_of
from minima.models.shape import ModelShape
from minima.recipe.pruning import PruneTarget

WIDTH_MULTIPLE = 8  # a sparsity target's widths and neurons are multiples of this, for a GPU's matrix units


@dataclass(frozen=True)
class TargetPlan:
    """How much of a model to keep.

    Attributes:
        source: the shape of the model to prune.
        student: the shape of the checkpoint. With `global` selection it is an upper bound: all layers are padded to the
            widest, and only the ranking decides how wide that is.
        num_groups: key-value groups to keep per layer; for `global`, the mean over layers.
        num_neurons: neurons to keep per layer; for `global`, the mean over layers.
        selection: `local` or `global`.
        width_percent: p', the percentage to remove from each of heads, neurons and width; None for explicit counts.
    """

    source: ModelShape
    student: ModelShape
    num_groups: int
    num_neurons: int
    selection: Literal["local", "global"]
    width_percent: int | None


def width_percent(sparsity: float) -> int:
    """p' = 100 - round(100 sqrt(1 - p / 100)): removing p' percent of both dimensions removes p percent of a matrix.

    Args:
        sparsity: p, the percentage of weights to remove.
    """
    return 100 - round(100 * math.sqrt(1 - sparsity / 100))


def fills_width(shape: ModelShape) -> bool:
    """Whether stock models of this family require num_heads x head_size = hidden_size."""
    return shape.family in ("gpt_neox", "gpt2")


def resized(shape: ModelShape, **changes: Any) -> ModelShape:
    """`shape` with some fields changed and validated again.

    Raises:
        ShapeError: the stock configuration refuses that shape.
    """
    try:
        return ModelShape(**(shape.model_dump() | changes))
    except ValidationError as error:
        for detail in error.errors():
            cause = detail.get("ctx", {}).get("error")
            if isinstance(cause, MinimaError):
                raise cause from None
        raise


def plan_target(
    shape: ModelShape, target: PruneTarget, *, selection: Literal["local", "global"] = "local"
) -> TargetPlan:
    """The student's shape, determined before any data or weight is read.

    For a sparsity, counts are rounded: key-value groups to the nearest count, at least one; neurons and width to the
    nearest multiple of 8 (of 1 if the model's own is not a multiple of 8). The width must also be valid in the stock
    configuration: a multiple of the kept heads for Llama, exactly heads x head size for GPT-NeoX and GPT-2; with
    `global` selection a multiple of all heads, because some layer may keep them all.

    Args:
        shape: of the model to prune.
        target: what the recipe asks for.
        selection: `global` lets counts differ between layers.

    Raises:
        ShapeError: the target is larger than the model, its heads are not whole key-value groups, or the stock
            configuration refuses the shape.
    """
    percent = None if target.sparsity is None else width_percent(target.sparsity)
    layers = target.num_layers or shape.num_layers
    if percent is None:
        heads = target.num_heads or shape.num_heads
        neurons = target.intermediate_size or shape.intermediate_size
        hidden = target.hidden_size or shape.hidden_size
    else:
        group = shape.num_heads // shape.num_key_value_heads
        heads = group * _nearest(shape.num_key_value_heads, percent, 1)
        neurons = _nearest(shape.intermediate_size, percent, _multiple(shape.intermediate_size))
        varied = selection == "global" and not fills_width(shape)  # a layer may then keep any number of heads
        hidden = _hidden_for(shape, shape.num_heads if varied else heads, percent)
    for what, wanted, present in (
        ("num_layers", layers, shape.num_layers),
        ("hidden_size", hidden, shape.hidden_size),
        ("num_heads", heads, shape.num_heads),
        ("intermediate_size", neurons, shape.intermediate_size),
    ):
        if wanted > present:
            raise ShapeError(
                f"a target with {what} {wanted} for a model with {present}",
                "pruning only removes; it cannot add what is missing",
                f"choose {what} of at most {present}",
            )
    groups = _groups(shape, heads)
    padded_groups, padded_neurons = groups, neurons
    if selection == "global":
        padded_groups, padded_neurons = padded_heads(shape, hidden, shape.num_key_value_heads), shape.intermediate_size
    student = resized(
        shape,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=padded_groups * (shape.num_heads // shape.num_key_value_heads),
        num_key_value_heads=padded_groups,
        intermediate_size=padded_neurons,
    )
    return TargetPlan(shape, student, groups, neurons, selection, percent)


def padded_heads(shape: ModelShape, hidden: int, widest_groups: int) -> int:
    """Key-value groups of a globally pruned checkpoint: the fewest that fit its widest layer and give a valid shape.

    Args:
        shape: of the model to prune.
        hidden: the student's width, with which the heads must be compatible.
        widest_groups: key-value groups of the widest layer.

    Raises:
        ShapeError: no number of zero heads gives a shape that the stock configuration accepts.
    """
    group = shape.num_heads // shape.num_key_value_heads
    if fills_width(shape):
        if hidden == shape.hidden_size:
            return shape.num_key_value_heads  # heads x head size must equal the width, so no head is removed
    else:
        for groups in range(widest_groups, 2 * shape.num_key_value_heads + 1):
            if shape.family != "llama" or hidden % (groups * group) == 0:
                return groups
    raise ShapeError(
        f"global selection in a {shape.family} model pruned to width {hidden}",
        "its layers keep different numbers of heads, and no common number to pad them to is valid with that width in "
        "the stock configuration",
        "use local selection, or give explicit counts that keep hidden_size at "
        f"{shape.hidden_size} (a sparsity reduces the width too)",
    )


def layer_range(num_layers: int, keep: int) -> range:
    """The layers to keep when as many are dropped at the bottom as at the top.

    If the number to drop is odd, the extra one is dropped at the top, where neighbouring layers are most alike.
    """
    bottom = (num_layers - keep) // 2
    return range(bottom, bottom + keep)


def check_norm_compensation(shape: ModelShape, norm_compensation: Literal["none", "rms"]) -> None:
    """Refuse to compensate norms that are not RMSNorms.

    Raises:
        ShapeError: `rms` for a family with LayerNorms.
    """
    if norm_compensation == "rms" and not family_of(shape.family).rms:
        raise ShapeError(
            f"norm_compensation 'rms' for a {shape.family} model",
            "a LayerNorm also subtracts the mean, which no scaling of its weight can compensate",
            "set norm_compensation: none",
        )


def check_depth(config: dict[str, Any], num_layers: int) -> None:
    """Refuse to drop layers of a model whose layers depend on their own index.

    Raises:
        ShapeError: layers of a GPT-2 that scales attention by the layer's index would be dropped.
    """
    if config.get("scale_attn_by_inverse_layer_idx") and num_layers != config["n_layer"]:
        raise ShapeError(
            f"{num_layers} of {config['n_layer']} layers of a GPT-2 with scale_attn_by_inverse_layer_idx",
            "layers that get a new index would scale their attention differently",
            "omit num_layers from the target",
        )


def _groups(shape: ModelShape, heads: int) -> int:
    group = shape.num_heads // shape.num_key_value_heads
    if heads % group:
        raise ShapeError(
            f"a target of {heads} query heads, but {group} share each key-value head",
            "a key-value head is kept or removed together with all the query heads that share it",
            f"choose num_heads as a multiple of {group}",
        )
    return heads // group


def _multiple(size: int) -> int:
    return WIDTH_MULTIPLE if size % WIDTH_MULTIPLE == 0 else 1


def _nearest(size: int, percent: int, multiple: int) -> int:
    """What remains of `size` without `percent` of it, as the nearest multiple, at least one; ties round up."""
    wanted = size * (100 - percent) / 100
    return max(multiple, min(size // multiple, math.floor(wanted / multiple + 0.5)) * multiple)


def _hidden_for(shape: ModelShape, heads: int, percent: int) -> int:
    if fills_width(shape):
        return heads * shape.head_size
    multiple = _multiple(shape.hidden_size)
    if shape.family != "llama":
        return _nearest(shape.hidden_size, percent, multiple)
    multiple = math.lcm(multiple, heads) if math.lcm(multiple, heads) <= shape.hidden_size else heads
    return _nearest(shape.hidden_size, percent, multiple)

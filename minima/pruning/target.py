"""What a pruning target asks for, as a student's shape. No torch: the dry run reads it too."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from minima.errors import MinimaError, ShapeError
from minima.models.families import family_of
from minima.models.shape import ModelShape
from minima.recipe.pruning import PruneTarget

WIDTH_MULTIPLE = 8  # widths and neurons of a sparsity target stay multiples of it, for the matrix units of a GPU


@dataclass(frozen=True)
class TargetPlan:
    """What stays of a model.

    Attributes:
        source: the model that is cut.
        student: the shape of the checkpoint. With `global` selection the widest that it can get: the ranking decides
            how wide the widest layer is, to which all are padded.
        num_groups: key-value groups that stay in a layer; their mean over layers, when `global`.
        num_neurons: neurons that stay in a layer; their mean over layers, when `global`.
        selection: `local` or `global`.
        width_percent: p', the percent that each of heads, neurons and width was to lose; None for explicit counts.
    """

    source: ModelShape
    student: ModelShape
    num_groups: int
    num_neurons: int
    selection: Literal["local", "global"]
    width_percent: int | None


def width_percent(sparsity: float) -> int:
    """p' = 100 - round(100 sqrt(1 - p / 100)): cutting p' percent of both dimensions removes p percent of a matrix.

    Args:
        sparsity: p, percent of the weights.
    """
    return 100 - round(100 * math.sqrt(1 - sparsity / 100))


def fills_width(shape: ModelShape) -> bool:
    """Whether stock models of this family need num_heads x head_size = hidden_size."""
    return shape.family in ("gpt_neox", "gpt2")


def resized(shape: ModelShape, **changes: Any) -> ModelShape:
    """`shape` with some fields changed, checked again.

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
    """The student's shape, before any data or weight is read.

    A sparsity's counts are rounded so: key-value groups to the nearest count that keeps at least one; neurons and
    width to the nearest multiple of 8 (of 1 in models that are no multiple of 8 themselves). A width also has to be
    what the stock configuration takes: a multiple of the heads that stay for Llama, exactly heads x head size for
    GPT-NeoX and GPT-2; with `global` selection a multiple of all heads, which may stay in some layer.

    Args:
        shape: of the model to cut.
        target: what the recipe asks for.
        selection: `global` lets counts differ between layers.

    Raises:
        ShapeError: larger than the model, heads that are no whole key-value groups, or a shape that the stock
            configuration refuses.
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
        varied = selection == "global" and not fills_width(shape)  # a layer may then keep any number of heads, or all
        hidden = _hidden_for(shape, shape.num_heads if varied else heads, percent)
    for what, wanted, present in (
        ("num_layers", layers, shape.num_layers),
        ("hidden_size", hidden, shape.hidden_size),
        ("num_heads", heads, shape.num_heads),
        ("intermediate_size", neurons, shape.intermediate_size),
    ):
        if wanted > present:
            raise ShapeError(
                f"a target with {what} {wanted}, of a model with {present}",
                "pruning only removes; there is nothing to fill the rest with",
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
    """Key-value groups of a globally pruned checkpoint: the fewest that hold the widest layer and that load.

    Args:
        shape: of the model that is cut.
        hidden: the width that stays, which the heads have to go with.
        widest_groups: key-value groups of the widest layer.

    Raises:
        ShapeError: no number of zero heads makes the shape one that the stock configuration takes.
    """
    group = shape.num_heads // shape.num_key_value_heads
    if fills_width(shape):
        if hidden == shape.hidden_size:
            return shape.num_key_value_heads  # heads x head size has to stay the width, so no head is removed
    else:
        for groups in range(widest_groups, 2 * shape.num_key_value_heads + 1):
            if shape.family != "llama" or hidden % (groups * group) == 0:
                return groups
    raise ShapeError(
        f"global selection in a {shape.family} model cut to width {hidden}",
        "its layers keep different numbers of heads, and padded to one number they do not go with that width in the "
        "stock configuration",
        "select locally, or give explicit counts that leave hidden_size at "
        f"{shape.hidden_size} (a sparsity cuts the width too)",
    )


def layer_range(num_layers: int, keep: int) -> range:
    """The layers that a symmetric cut keeps: as many dropped at the bottom as at the top.

    Of an odd number, the one more is dropped at the top, where neighbouring layers are most alike.
    """
    bottom = (num_layers - keep) // 2
    return range(bottom, bottom + keep)


def check_norm_compensation(shape: ModelShape, norm_compensation: Literal["none", "rms"]) -> None:
    """Refuse to compensate norms that are no RMSNorms.

    Raises:
        ShapeError: `rms` for a family with LayerNorms.
    """
    if norm_compensation == "rms" and not family_of(shape.family).rms:
        raise ShapeError(
            f"norm_compensation 'rms' for a {shape.family} model",
            "a LayerNorm subtracts the mean as well, which no scale of its weight makes up for",
            "set norm_compensation: none",
        )


def check_depth(config: dict[str, Any], num_layers: int) -> None:
    """Refuse to drop layers of a model whose layers compute by their own number.

    Raises:
        ShapeError: a GPT-2 that scales attention by the layer's number, cut in depth.
    """
    if config.get("scale_attn_by_inverse_layer_idx") and num_layers != config["n_layer"]:
        raise ShapeError(
            f"{num_layers} of {config['n_layer']} layers of a GPT-2 with scale_attn_by_inverse_layer_idx",
            "layers that move to another place would scale their attention differently",
            "leave num_layers out of the target",
        )


def _groups(shape: ModelShape, heads: int) -> int:
    group = shape.num_heads // shape.num_key_value_heads
    if heads % group:
        raise ShapeError(
            f"a target of {heads} query heads, where {group} share a key-value head",
            "a key-value head goes or stays together with all the query heads that it serves",
            f"choose num_heads as a multiple of {group}",
        )
    return heads // group


def _multiple(size: int) -> int:
    return WIDTH_MULTIPLE if size % WIDTH_MULTIPLE == 0 else 1


def _nearest(size: int, percent: int, multiple: int) -> int:
    """What stays of `size` when `percent` goes, as a multiple that is at least one; exact halves keep more."""
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

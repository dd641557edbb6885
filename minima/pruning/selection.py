"""Selection of the layers, heads, neurons and dimensions to keep. Indices are int64, ascending to preserve order."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minima.errors import ShapeError
from minima.models.shape import ModelShape
from minima.pruning.importance import Scores
from minima.pruning.target import TargetPlan, layer_range, padded_heads, resized

NORM_FLOOR = 1e-17  # keeps a layer whose scores are all zero at zero (MiniMA, `sparsify`)


@dataclass(frozen=True)
class Selection:
    """The parts of a model that are kept.

    Attributes:
        source: shape of the model that is pruned.
        student: shape of the resulting checkpoint, padding included.
        layers: indices of the layers to keep, int64.
        groups: the key-value groups to keep in each of these layers, int64.
        neurons: the neurons to keep in each of these layers, int64.
        hidden: the dimensions of the residual stream to keep, int64.
    """

    source: ModelShape
    student: ModelShape
    layers: Tensor
    groups: list[Tensor]
    neurons: list[Tensor]
    hidden: Tensor


def normalised(scores: Tensor) -> Tensor:
    """Scores divided by their L2 norm, row by row."""
    return scores / (torch.linalg.vector_norm(scores, dim=-1, keepdim=True) + NORM_FLOOR)


def select(scores: Scores, plan: TargetPlan, *, depth: Literal["symmetric", "importance"] = "symmetric") -> Selection:
    """Choose what to keep by the scores.

    Heads and neurons are chosen within the kept layers. `local` keeps the best of every layer, the same number in each.
    `global` ranks them across these layers by per-layer-normalised score and keeps the same total number, so that
    counts differ between layers (each keeps at least one group and one neuron); the student is then as wide as its
    widest layer.

    Args:
        scores: raw scores of the model.
        plan: of the target shape.
        depth: `symmetric` drops as many layers at the bottom as at the top; `importance` keeps the layers with the
            largest sum of raw head and neuron scores. Both scores are |dL/dmask|, the first-order change of the loss
            when one unit is removed, so the sum bounds to first order the cost of dropping the whole layer; normalised
            scores would give every layer the same weight.
    """
    if tuple(scores.head_LK.shape) != (plan.source.num_layers, plan.source.num_key_value_heads):
        raise ShapeError(
            f"scores of {scores.head_LK.shape[0]} layers with {scores.head_LK.shape[1]} key-value groups for a model "
            f"of {plan.source.num_layers} with {plan.source.num_key_value_heads}",
            "they were computed for a different model",
            "compute the scores of this one",
        )
    layers = _layers(scores, plan, depth)
    head_LK = normalised(scores.head_LK).index_select(0, layers)
    neuron_LI = normalised(scores.neuron_LI).index_select(0, layers)
    hidden = _best(scores.hidden_D, plan.student.hidden_size)
    if plan.selection == "local":
        groups = [_best(row, plan.num_groups) for row in head_LK]
        neurons = [_best(row, plan.num_neurons) for row in neuron_LI]
        return Selection(plan.source, plan.student, layers, groups, neurons, hidden)
    groups = _best_over_layers(head_LK, plan.num_groups)
    neurons = _best_over_layers(neuron_LI, plan.num_neurons)
    padded_groups = padded_heads(plan.source, plan.student.hidden_size, max(len(kept) for kept in groups))
    queries_per_group = plan.source.num_heads // plan.source.num_key_value_heads
    student = resized(
        plan.student,
        num_heads=padded_groups * queries_per_group,
        num_key_value_heads=padded_groups,
        intermediate_size=max(len(kept) for kept in neurons),
    )
    return Selection(plan.source, student, layers, groups, neurons, hidden)


def _layers(scores: Scores, plan: TargetPlan, depth: Literal["symmetric", "importance"]) -> Tensor:
    keep = plan.student.num_layers
    if depth == "symmetric":
        return torch.tensor(list(layer_range(plan.source.num_layers, keep)), dtype=torch.int64)
    return _best(scores.head_LK.double().sum(1) + scores.neuron_LI.double().sum(1), keep)


def _best(scores: Tensor, count: int) -> Tensor:
    """Ascending indices of the `count` largest scores; ties go to the lower index."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _best_over_layers(scores_LU: Tensor, count: int) -> list[Tensor]:
    """For each row, the ascending indices of the `count` x rows largest scores overall; at least one per row."""
    ranked = scores_LU.clone()
    first = scores_LU.argmax(1, keepdim=True)
    ranked.scatter_(1, first, torch.inf)  # always keep each layer's best, so that no layer ends up empty
    kept = torch.zeros_like(scores_LU, dtype=torch.bool).flatten()
    kept[_best(ranked.flatten(), count * len(scores_LU))] = True
    return [row.nonzero().flatten() for row in kept.view_as(scores_LU)]

"""Which layers, heads, neurons and hidden dimensions stay. Indices are int64 and ascending, so order is kept."""

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
    """What stays of a model.

    Attributes:
        source: shape of the model that is cut.
        student: shape of the checkpoint that comes out, padding included.
        layers: numbers of the layers that stay, int64.
        groups: for each of them the key-value groups that stay, int64.
        neurons: for each of them the neurons that stay, int64.
        hidden: the dimensions of the residual stream that stay, int64.
    """

    source: ModelShape
    student: ModelShape
    layers: Tensor
    groups: list[Tensor]
    neurons: list[Tensor]
    hidden: Tensor


def normalised(scores: Tensor) -> Tensor:
    """Scores over their L2 norm, each row by itself."""
    return scores / (torch.linalg.vector_norm(scores, dim=-1, keepdim=True) + NORM_FLOOR)


def select(scores: Scores, plan: TargetPlan, *, depth: Literal["symmetric", "importance"] = "symmetric") -> Selection:
    """Choose what stays by the scores.

    Heads and neurons are chosen within the layers that stay. `local` keeps the best of every layer, the same number in
    each. `global` ranks them over those layers by per-layer-normalised score and keeps as many in all, so that counts
    differ (at least one group and one neuron stay in each layer); the student is then as wide as the widest layer.

    Args:
        scores: raw scores of the model.
        plan: of the shape that is asked for.
        depth: `symmetric` drops as many layers at the bottom as at the top; `importance` keeps the layers with the
            largest sum of raw head and neuron scores. Both are |dL/dmask|, the first-order change of the loss when
            one of them goes, so the sum bounds to first order what dropping the whole layer costs; normalised scores
            would have every layer weigh the same.
    """
    if tuple(scores.head_LK.shape) != (plan.source.num_layers, plan.source.num_key_value_heads):
        raise ShapeError(
            f"scores of {scores.head_LK.shape[0]} layers with {scores.head_LK.shape[1]} key-value groups for a model "
            f"of {plan.source.num_layers} with {plan.source.num_key_value_heads}",
            "they were measured on another model",
            "measure the scores of this one",
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
    """Ascending indices of the `count` largest; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _best_over_layers(scores_LU: Tensor, count: int) -> list[Tensor]:
    """Ascending indices in each row of the `count` x rows largest of all, at least one in each row."""
    ranked = scores_LU.clone()
    first = scores_LU.argmax(1, keepdim=True)
    ranked.scatter_(1, first, torch.inf)  # each layer's best is in, so that no layer is left without any
    kept = torch.zeros_like(scores_LU, dtype=torch.bool).flatten()
    kept[_best(ranked.flatten(), count * len(scores_LU))] = True
    return [row.nonzero().flatten() for row in kept.view_as(scores_LU)]

"""The best stay, in order; ties, empty layers and depth are settled."""

import torch

from minima.models.shape import ModelShape
from minima.pruning.importance import Scores
from minima.pruning.selection import normalised, select
from minima.pruning.target import plan_target
from minima.recipe.pruning import PruneTarget

SHAPE = ModelShape(
    family="mistral", vocabulary_size=11, hidden_size=6, intermediate_size=4, num_layers=3, num_heads=3, head_size=2
)


def scores(**changes) -> Scores:
    values = {
        "head_LK": torch.tensor([[1.0, 3, 2], [4, 5, 6], [0, 0, 0]]),
        "neuron_LI": torch.tensor([[4.0, 1, 3, 2], [1, 1, 1, 1], [9, 8, 0, 7]]),
        "hidden_D": torch.tensor([1.0, 6, 2, 5, 3, 4]),
    }
    return Scores("random", "x", **(values | changes))


def test_local_keeps_the_best_of_every_layer_in_order():
    plan = plan_target(SHAPE, PruneTarget(num_heads=2, intermediate_size=2, hidden_size=3))
    chosen = select(scores(), plan)
    assert [groups.tolist() for groups in chosen.groups] == [[1, 2], [1, 2], [0, 1]]  # of equal ones the first
    assert [neurons.tolist() for neurons in chosen.neurons] == [[0, 2], [0, 1], [0, 1]]
    assert chosen.hidden.tolist() == [1, 3, 5]
    assert {index.dtype for index in (*chosen.groups, *chosen.neurons, chosen.hidden, chosen.layers)} == {torch.int64}


def test_normalisation_is_by_layer_and_bears_zeros():
    rows = normalised(scores().head_LK)
    torch.testing.assert_close(rows.norm(dim=1), torch.tensor([1.0, 1.0, 0.0]))


def test_global_ranks_over_layers_and_leaves_none_empty():
    plan = plan_target(SHAPE, PruneTarget(num_heads=1, intermediate_size=2, hidden_size=6), selection="global")
    chosen = select(scores(), plan)
    assert [len(groups) for groups in chosen.groups] == [1, 1, 1]  # the layer of zeros keeps one
    assert [neurons.tolist() for neurons in chosen.neurons] == [[0, 2], [0], [0, 1, 3]]
    assert chosen.student.intermediate_size == 3


def test_global_ranks_only_over_the_layers_that_stay():
    plan = plan_target(SHAPE, PruneTarget(num_layers=1, intermediate_size=2), selection="global")
    chosen = select(scores(), plan)
    assert chosen.layers.tolist() == [1]
    assert [len(neurons) for neurons in chosen.neurons] == [2]
    assert chosen.student.intermediate_size == 2


def test_depth_by_importance_keeps_the_layers_that_cost_most_in_order():
    plan = plan_target(SHAPE, PruneTarget(num_layers=2))
    assert select(scores(), plan, depth="importance").layers.tolist() == [1, 2]  # sums are 16, 19 and 24
    assert select(scores(), plan, depth="symmetric").layers.tolist() == [0, 1]
    whole = plan_target(SHAPE, PruneTarget())
    assert select(scores(), whole, depth="importance").layers.tolist() == [0, 1, 2]
    assert select(scores(), whole).layers.tolist() == [0, 1, 2]


def test_global_ranks_each_score_by_its_own_layers_norm():
    """Scores of a layer that are all larger by a factor buy it no more heads or neurons."""
    plan = plan_target(SHAPE, PruneTarget(num_heads=2, intermediate_size=2, hidden_size=6), selection="global")
    rows = {"head_LK": torch.tensor([[9.0, 8, 7], [9, 1, 8], [9, 1, 1]]),
            "neuron_LI": torch.tensor([[9.0, 8, 7, 8], [1, 9, 1, 1], [9, 1, 8, 1]])}  # fmt: skip
    wanted = select(scores(**rows), plan)
    assert [len(groups) for groups in wanted.groups] == [3, 2, 1]
    assert [len(neurons) for neurons in wanted.neurons] == [3, 1, 2]
    factors_L1 = torch.tensor([[0.1], [1.0], [100.0]])
    found = select(scores(**{name: rows_LU * factors_L1 for name, rows_LU in rows.items()}), plan)
    for one, other in zip(wanted.groups + wanted.neurons, found.groups + found.neurons, strict=True):
        assert one.tolist() == other.tolist()


def test_depth_by_importance_sums_heads_and_neurons_as_they_are():
    """Not their means: many small scores cost as much as a few large ones."""
    plan = plan_target(SHAPE, PruneTarget(num_layers=1))
    heads_LK = torch.tensor([[3.0, 3, 3], [0, 0, 0], [1, 1, 1]])
    neurons_LI = torch.tensor([[0.0, 0, 0, 0], [2.5, 2.5, 2.5, 2.5], [1.7, 1.7, 1.7, 1.7]])
    chosen = select(scores(head_LK=heads_LK, neuron_LI=neurons_LI), plan, depth="importance")
    assert chosen.layers.tolist() == [1], "sums are 9, 10 and 9.8; sums of means 3, 2.5 and 2.7"

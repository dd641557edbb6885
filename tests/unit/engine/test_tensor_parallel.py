"""What a split teacher cannot be split over is refused before it is read."""

import pytest

from minima.engine.teacher.tensor_parallel import check_group, check_split
from minima.errors import RecipeError, ShapeError
from minima.models.shape import ModelShape

SHAPE = {"vocabulary_size": 8, "hidden_size": 32, "intermediate_size": 8, "num_layers": 1, "num_heads": 8}


@pytest.mark.parametrize(
    ("nodes", "ranks", "fits"),
    [
        ([[0, 1, 2, 3]], 4, True),
        ([[0, 1, 2, 3]], 2, True),
        ([[0, 1], [2, 3]], 2, True),
        ([[0, 1], [2, 3]], 4, False),
        ([[0, 1, 2, 3]], 3, False),
        ([[0, 2], [1, 3]], 2, False),
        ([[0, 1, 2], [3, 4, 5]], 2, False),
    ],
)
def test_a_group_lies_in_one_node(nodes, ranks, fits):
    if fits:
        check_group(nodes, ranks)
    else:
        with pytest.raises(RecipeError, match=f"over {ranks} ranks"):
            check_group(nodes, ranks)


def test_heads_divide_and_the_family_is_known():
    check_split(ModelShape(**SHAPE, num_key_value_heads=4), 4)
    with pytest.raises(ShapeError, match="4 key-value heads"):
        check_split(ModelShape(**SHAPE, num_key_value_heads=4), 8)
    with pytest.raises(ShapeError, match="gpt2"):
        check_split(ModelShape(**SHAPE, family="gpt2"), 2)
    with pytest.raises(RecipeError, match="over a single rank"):
        check_split(ModelShape(**SHAPE), 1)

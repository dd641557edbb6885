"""YAML that is valid, and still cannot be read as a recipe."""

import pytest

from minima.errors import RecipeError
from minima.recipe.loading import read_yaml
from minima.recipe.overrides import apply_override


@pytest.fixture
def read(tmp_path):
    def read(content: str):
        path = tmp_path / "recipe.yaml"
        path.write_text(content, encoding="utf-8")
        return read_yaml(path)

    return read


def test_merges_of_merges_are_refused_before_they_fill_the_memory(read):
    levels = [f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 60)]
    with pytest.raises(RecipeError, match=r"line 18, .*: with its merges \(`<<`\) it has more than 100,000 keys"):
        read("\n".join(["a0: &a0 {x: 1}", *levels]))


def test_a_block_may_merge_others(read):
    assert read("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}")["b"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("2026-13-01", "month must be in"),
        ("9" * 5000, "4300 digits"),
        ("!!bool x", "'x' does not fit its tag"),
        ("!!float ''", "'' does not fit its tag"),
    ],
)
def test_a_value_that_python_cannot_hold_is_named_by_its_line(read, value, problem):
    with pytest.raises(RecipeError, match=f"line 2, column 9: .*{problem}"):
        read(f"name: a\noutput: {value}")
    with pytest.raises(RecipeError, match="has a value that is not YAML"):
        apply_override({}, f"output={value}")

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


def test_merges_of_merges_do_not_fill_the_memory(read):
    levels = [f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}], key_{i}: 1}}" for i in range(1, 60)]
    assert read("\n".join(["a0: &a0 {x: 1}", *levels]))["a59"] == {"x": 1, **{f"key_{i}": 1 for i in range(1, 60)}}


def test_merges_that_copy_too_much_are_refused(read):
    chain = [f"a{i}: &a{i} {{<<: *a{i - 1}, key_{i}: 1}}" for i in range(1, 600)]
    with pytest.raises(RecipeError, match=r"line 447, .*: up to here its merges \(`<<`\) copy more than 100,000 keys"):
        read("\n".join(["a0: &a0 {x: 1}", *chain]))


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("{<<: *a, rate: 3}", {"rate": 3, "size": 1}),
        ("{rate: 3, <<: *a}", {"rate": 3, "size": 1}),
        ("{<<: [*a, *b]}", {"rate": 1, "size": 1, "tokens": 2}),
        ("{<<: [*b, *a]}", {"rate": 2, "size": 1, "tokens": 2}),
        ("{<<: [*c, *b]}", {"rate": 1, "size": 1, "tokens": 4}),
        ("{<<: *e}", {"rate": 1, "size": 5}),
        ("{<<: *a, =: 6}", {"rate": 1, "size": 1, "=": 6}),
        ("&d {<<: *d, rate: 3}", {"rate": 3}),
    ],
)
def test_a_block_has_its_own_keys_then_those_of_the_block_that_is_merged_first(read, block, expected):
    blocks = (
        "a: &a {rate: 1, size: 1}\nb: &b {rate: 2, tokens: 2}\nc: &c {<<: *a, tokens: 4}\ne: &e {<<: *a, size: 5}\n"
    )
    assert read(f"{blocks}it: {block}")["it"] == expected


def test_only_blocks_can_be_merged(read):
    with pytest.raises(RecipeError, match=r"line 1, column 10: only blocks of keys .* this is a scalar"):
        read("a: {<<: [3]}")


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

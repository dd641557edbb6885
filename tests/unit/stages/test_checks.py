"""What is refused before anything starts."""

from pathlib import Path

import pytest

from minima.errors import RecipeError
from minima.recipe.schema import Recipe
from minima.stages import checks

PUBLISH = {"name": "push", "kind": "publish", "model": "some/model", "repo": "somebody/model"}
BENCHMARK = {"name": "scores", "kind": "benchmark", "model": "some/model", "tasks": ["minima_continuation"]}


def check(stage, tmp_path):
    recipe = Recipe(name="test", stages=[stage], launcher="local")
    checks.check_stages(recipe, Path("test.yaml"), recipe.stages, tmp_path, ranks=1)


def test_a_push_without_a_token(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(RecipeError, match="no token for the Hub"):
        check(PUBLISH, tmp_path)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "a token")
    check(PUBLISH, tmp_path)


def test_a_benchmark_without_its_harness(tmp_path, monkeypatch):
    check(BENCHMARK, tmp_path)
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'minima\[benchmark\]'"):
        check(BENCHMARK, tmp_path)

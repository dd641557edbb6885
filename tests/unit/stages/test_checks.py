"""What is refused before anything starts."""

from pathlib import Path

import pytest

from minima.errors import DeepSpeedConfigError, RecipeError
from minima.recipe.schema import Recipe
from minima.stages import checks

PUBLISH = {"name": "push", "kind": "publish", "model": "some/model", "repo": "somebody/model"}
BENCHMARK = {"name": "scores", "kind": "benchmark", "model": "some/model", "tasks": ["minima_continuation"]}

DISTIL = {
    "name": "student", "kind": "distil", "model": "some/model", "data": "data", "batch_sequences": 2,
    "micro_batch_sequences": 1, "steps": 1, "learning_rate": 1e-3,
}  # fmt: skip


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


def test_a_teachers_json_is_checked_for_its_own_placement(tmp_path):
    def with_teacher(placement: str, file: str, offload: str = "none"):
        teacher = {"source": "big", "placement": placement, "offload": offload, "deepspeed": file}
        check(DISTIL | {"teacher": teacher | ({"nvme_path": "/x"} if offload == "nvme" else {})}, tmp_path)

    with_teacher("replica", "teacher_replica.json")
    with_teacher("tensor_parallel", "teacher_tensor_parallel.json")
    with_teacher("zero3_node", "teacher_nvme.json", "nvme")
    with pytest.raises(DeepSpeedConfigError, match="stage to 0"):
        with_teacher("replica", "teacher_zero3.json")

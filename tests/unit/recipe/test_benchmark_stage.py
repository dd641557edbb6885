"""What a benchmark stage refuses in a recipe."""

import pytest
from pydantic import ValidationError

from minima.recipe.release import Benchmark


def stage(**keys):
    return Benchmark(name="scores", kind="benchmark", model="m", **keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "names no suite, no tasks and no answers"),
        ({"suite": "minima", "num_fewshot": 3}, "sets num_fewshot, which nothing in it reads"),
        (
            {"answers": [{"format": "mt_bench", "questions": "q"}], "limit": 3, "data_folder": "d"},
            "sets data_folder, limit, which nothing in it reads",
        ),
        ({"suite": "minima", "tasks": ["piqa", "mmlu"]}, "give mmlu, a name that its results have already"),
        ({"suite": "minima", "tasks": ["bbh_stand_in"]}, "give bbh_stand_in, a name"),
        ({"tasks": ["piqa", "arc_easy", "piqa"]}, "give piqa, a name"),
        ({"tasks": ["left_out", "answers"]}, "give left_out, answers, a name"),
        ({"answers": [{"format": "mt_bench", "questions": q} for q in "ab"]}, "name mt_bench and mt_bench"),
    ],
)
def test_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        stage(**keys)


def test_accepted():
    assert stage(suite="minima", limit=3, data_folder="d", task_folder="t").seed == 1234
    assert stage(tasks=["piqa"], num_fewshot=0).num_fewshot == 0
    assert stage(tasks=["mmlu"]).tasks == ["mmlu"]  # without the suite the name is free
    assert stage(suite="minima", tasks=["mmlu_anatomy"]).tasks == ["mmlu_anatomy"]

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
        ({"suite": "minima", "num_fewshot": 3}, "sets num_fewshot, which nothing in it uses"),
        (
            {"answers": [{"format": "mt_bench", "questions": "q"}], "limit": 3, "data_folder": "d"},
            "sets data_folder, limit, which nothing in it uses",
        ),
        ({"suite": "minima", "tasks": ["piqa", "mmlu"]}, "name mmlu, which its results"),
        ({"suite": "minima", "tasks": ["bbh_stand_in"]}, "name bbh_stand_in, which its results"),
        ({"tasks": ["piqa", "arc_easy", "piqa"]}, "name piqa, which its results"),
        ({"tasks": ["left_out", "answers"]}, "name left_out, answers, which its results"),
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

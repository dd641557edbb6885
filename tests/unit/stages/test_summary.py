"""What summary.json counts."""

import json

import pytest
import yaml

from minima.errors import RecipeError
from minima.recipe.loading import load_recipe
from minima.stages.driver.summary import write_summary

STAGES = [
    {"name": "c", "kind": "build_data", "sources": [{"embedded": "sotu"}], "tokenizer": "t", "sequence_length": 64},
    {"name": "a", "kind": "adapt", "model": "base", "data": "c", "steps": 9, "batch_sequences": 1,
     "micro_batch_sequences": 1, "learning_rate": 1e-3, "evaluate_every_steps": 3, "patience": 1},
]  # fmt: skip


def test_tokens_are_those_in_the_weights_that_are_left(tmp_path):
    path, out = tmp_path / "x.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump({"name": "x", "output": str(out), "stages": STAGES}))
    for name, tokens in (("c", 10_000), ("a", 192)):
        (out / name).mkdir(parents=True)
        (out / name / "manifest.json").write_text(json.dumps({"seconds": 1.5, "metrics": {"tokens": tokens}}))
    # The stage ended after step 6 and left the checkpoint of step 3.
    (out / "a" / "metrics.jsonl").write_text('{"step": 3, "tokens": 192}\n{"step": 6, "tokens": 384}\n')
    summary = write_summary(load_recipe(path), out)
    assert summary is not None
    assert summary["tokens"] == 192, "no tokens of data that was built, none of steps that were given up"


METRICS = {"layers": [0, 2], "loss": 2.0, "other": 4, "table": {"x": 1.0}, "none": None}


@pytest.mark.parametrize("name", ["layers", "table", "none"])
def test_what_is_no_number_is_not_averaged(tmp_path, name):
    path, out = tmp_path / "x.yaml", tmp_path / "out"
    (out / "c").mkdir(parents=True)
    (out / "c" / "manifest.json").write_text(json.dumps({"seconds": 1.5, "metrics": METRICS}))

    def summary(asked):
        content = {"name": "x", "output": str(out), "stages": STAGES[:1], "summary": {"a": asked}}
        path.write_text(yaml.safe_dump(content))
        return write_summary(load_recipe(path), out)["a"]

    assert summary(["c.loss", "c.other"]) == 3.0
    assert summary(f"c.{name}") == METRICS[name]
    with pytest.raises(RecipeError, match=rf"summary\.a: 'c\.{name}' is not a number"):
        summary(["c.loss", f"c.{name}"])

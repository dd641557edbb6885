"""What summary.json counts."""

import json

import yaml

from minima.recipe.loading import load_recipe
from minima.stages.summary import write_summary

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

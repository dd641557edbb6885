"""Which scores a model card shows."""

import json
import logging
from pathlib import Path

import pytest

from minima.launcher import Launch
from minima.recipe.schema import Recipe
from minima.stages.card_facts import _scores
from minima.stages.context import StageContext

TRAINING = {"data": "c", "batch_sequences": 4, "micro_batch_sequences": 2, "steps": 10, "learning_rate": 1e-3}


@pytest.fixture
def scores(tmp_path, caplog):
    """What the card of a model shows, where `quality` has scored others; and what is said about it."""

    def scores(model, *scored, finished=True):
        caplog.clear()
        recipe = Recipe(
            name="test",
            stages=[
                {"name": "student", "kind": "adapt", "model": "t", **TRAINING},
                {"name": "quality", "kind": "evaluate", "models": scored, "data": "c"},
                {"name": "out", "kind": "export", "model": model},
            ],
        )
        metrics = {"student": {"step": 10}, "quality": {name: {"loss": 1.0} for name in scored}}
        for name, found in metrics.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "manifest.json").write_text(json.dumps({"metrics": found}))
        if not finished:
            (tmp_path / "quality" / "manifest.json").unlink()
        stage = recipe.stage("out")
        context = StageContext(recipe, Path("r.yaml"), stage, tmp_path / "out", tmp_path, Launch())
        return list(_scores(context, model)), caplog.text

    caplog.set_level(logging.INFO, logger="minima")
    return scores


def test_the_last_step_goes_by_two_names(scores):
    assert scores("student", "t", "student") == (["t", "student"], "")
    assert scores("student@10", "student") == (["student"], "")
    assert scores("student", "student@10") == (["student@10"], "")
    assert scores("student@4", "student@4") == (["student@4"], "")


@pytest.mark.parametrize(("model", "scored"), [("student@4", "student"), ("student", "student@4"), ("other", "t")])
def test_a_card_without_scores_says_why(scores, model, scored):
    found, said = scores(model, scored)
    assert not found
    assert (
        f"the card of {model} shows no scores: no finished evaluate stage names {model} (quality scores {scored})"
        in said
    )


def test_an_evaluation_that_has_not_ended_shows_nothing(scores):
    found, said = scores("student", "student", finished=False)
    assert not found
    assert "no finished evaluate stage" in said

"""Which scores a model card shows."""

import json
import logging
import re
from pathlib import Path

import pytest

from minima.launcher import Launch
from minima.models.shape import ModelShape
from minima.recipe.schema import Recipe
from minima.report.cards import model_card
from minima.stages.context import StageContext
from minima.stages.release.card_facts import _scores, _settings, gather_card, taught_to_chat

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


CHAT = Recipe(
    name="chat",
    stages=[
        {"name": "text", "kind": "build_data", "sources": [{"hub": "org/text"}, {"path": "x.txt"}], "tokenizer": "t",
         "sequence_length": 8},
        {"name": "talks", "kind": "build_data", "sources": [{"hub": "org/talks"}], "tokenizer": "t",
         "sequence_length": 8, "format": "conversations"},
        {"name": "pairs", "kind": "build_data", "sources": [{"embedded": "preferences"}], "tokenizer": "t",
         "sequence_length": 8, "format": "preferences"},
        {"name": "grown", "kind": "expand_vocabulary", "model": "org/base", "donor": "d"},
        {"name": "adapted", "kind": "adapt", "model": "grown", **TRAINING | {"data": "text"}},
        {"name": "cut", "kind": "prune", "model": "adapted@5", "target": {"num_layers": 2}, "score": "random"},
        {"name": "tuned", "kind": "instruct", "model": "cut", **TRAINING | {"data": "talks"}},
        {"name": "aligned", "kind": "align", "model": "tuned", **TRAINING | {"data": "pairs"}},
        {"name": "out", "kind": "export", "model": "aligned", "languages": ["en"], "datasets": ["org/more"]},
    ],
)  # fmt: skip
CONFIG = ModelShape(vocabulary_size=48, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2).to_config()
MEASURED = {"parameters": 10, "dtype": "float32", "max_logit_difference": 0.0, "checked_by": []}


@pytest.fixture
def card(tmp_path):
    """The card of the chat recipe's export, or of another model of it."""
    metrics = {
        "adapted": {"step": 10, "tokens": 800, "held_out_loss": 3.0},
        "tuned": {"step": 10, "tokens": 80, "held_out_loss": 2.0, "loss": 2.5},
        "aligned": {"step": 9, "tokens": 8, "held_out_loss": 0.6, "held_out_accuracy": 0.7, "held_out_margin": 0.1},
    }
    for name, found in metrics.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"metrics": found}))
    records = [
        {"step": 5, "tokens": 400, "loss": 3.4}, {"step": 5, "held_out_loss": 3.9}, {"step": 5, "held_out_loss": 3.3},
        {"step": 10, "tokens": 800},
    ]  # fmt: skip
    (tmp_path / "adapted" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def card(**changes):
        stage = CHAT.stage("out").model_copy(update=changes)
        context = StageContext(CHAT, Path("r.yaml"), stage, tmp_path / "out", tmp_path, Launch())
        return gather_card(context, CONFIG, MEASURED, chat_template=True)

    return card


def test_the_way_of_a_chat_model_is_told_from_its_first_stage_on(card):
    made = card()
    assert [kind for _, kind, _ in made.stages] == ["expand_vocabulary", "adapt", "prune", "instruct", "align"]
    assert made.training == {
        "adapted": {"steps": 5, "tokens": 400, "held_out_loss": 3.3},
        "tuned": {"steps": 10, "tokens": 80, "held_out_loss": 2.0},
        "aligned": {"steps": 9, "tokens": 8, "held_out_loss": 0.6, "held_out_accuracy": 0.7, "held_out_margin": 0.1},
    }
    assert made.data == [
        "`org/text` (stage `text`)",
        "`x.txt` (stage `text`)",
        "`org/talks` (stage `talks` of conversations)",
        "`preferences` (stage `pairs` of preferences)",
    ]
    assert "over 488 tokens in 3 training stages" in model_card(made)


def test_what_the_hub_can_link_is_named(card, tmp_path, monkeypatch):
    made = card()
    assert made.datasets == ["org/more", "org/text", "org/talks"]
    assert made.base_model == "org/base"
    assert card(base_model="org/other").base_model == "org/other"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "base").mkdir(parents=True)
    (tmp_path / "org" / "text").mkdir()
    local = card()
    assert local.base_model is None, "a folder of that name comes first"
    assert local.datasets == ["org/more", "org/talks"]


def test_a_model_that_nothing_here_trained(card):
    made = card(model="org/base")
    assert (made.stages, made.training, made.data) == ([], {}, [])
    assert made.base_model == "org/base"


def test_a_card_does_not_tell_where_files_lay():
    corpus = {
        "name": "corpus", "kind": "build_data", "sequence_length": 8, "tokenizer": "~/tokenizer/",
        "sources": [{"path": "/home/somebody/own.jsonl"}, {"path": "data/open.jsonl"}],
    }  # fmt: skip
    told = _settings(Recipe(name="test", stages=[corpus]).stage("corpus"))
    assert told["sources"] == [{"path": "own.jsonl"}, {"path": "data/open.jsonl"}]
    assert told["tokenizer"] == "tokenizer"


def test_nothing_on_a_card_tells_where_files_lay(tmp_path):
    steps = TRAINING | {"data": "/home/me/runs/data"}
    recipe = Recipe(
        name="mine",
        stages=[
            {"name": "c", "kind": "build_data", "tokenizer": "~/secret/tokenizer", "sequence_length": 8,
             "sources": [{"path": "/home/me/secret/c.jsonl"}, {"hub": "~/sets/own/"}]},
            {"name": "first", "kind": "adapt", "model": "/home/me/models/base", **steps},
            {"name": "student", "kind": "adapt", "model": "first", **TRAINING},
            {"name": "quality", "kind": "evaluate", "models": ["student", "/home/me/a/base", "/home/me/b/base/"],
             "teacher": "~/base", "data": "c"},
            {"name": "out", "kind": "export", "model": "student", "datasets": ["/home/me/sets/x"],
             "base_model": "/home/me/models/base"},
        ],
    )  # fmt: skip
    (tmp_path / "quality").mkdir()
    scored = {name: {"loss": float(number)} for number, name in enumerate([*recipe.stage("quality").models, "~/base"])}
    (tmp_path / "quality" / "manifest.json").write_text(json.dumps({"metrics": scored}))
    context = StageContext(recipe, Path("/home/me/r.yaml"), recipe.stage("out"), tmp_path / "out", tmp_path, Launch())
    made = gather_card(context, CONFIG, MEASURED, chat_template=True)
    text = model_card(made)
    assert not re.findall(r"(?<![\w.])~?/\w.*", text), "an absolute path"
    assert "~/" not in text
    assert not re.search("secret|/me|home", text)
    assert made.data == ["`data`", "`c.jsonl` (stage `c`)", "`own` (stage `c`)"]
    assert {name: row["loss"] for name, row in made.scores.items()} == {
        "student": 0.0, "base": 1.0, "base (3)": 2.0, "base (4)": 3.0,
    }, "models whose folders have the same name keep a row each"  # fmt: skip


@pytest.mark.parametrize(
    ("model", "taught"),
    [
        ("org/chat", False), ("cut", False), ("student", False), ("elsewhere", False), ("prepared", False),
        ("tuned", True), ("tuned@5", True), ("pruned_after", True), ("aligned", True), ("retold", True),
        ("retold_elsewhere", True),
    ],
)  # fmt: skip
def test_a_chat_model_is_one_that_a_stage_taught(tmp_path, model, taught):
    """Not one that came from a chat model of elsewhere and was only prepared, pruned or distilled on text."""
    folder = tmp_path / "elsewhere" / "talks"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"stage": {"kind": "build_data", "format": "conversations"}}))
    teacher = TRAINING | {"teacher": "org/chat"}
    cut = {"target": {"num_layers": 2}, "score": "gradient"}
    recipe = Recipe(
        name="chat",
        stages=[
            *CHAT.stages[:3],
            {"name": "cut", "kind": "prune", "model": "org/chat", "data": "talks", **cut},
            {"name": "student", "kind": "distil", "model": "cut", **teacher | {"data": "text"}},
            {"name": "elsewhere", "kind": "distil", "model": "cut", **teacher | {"data": "no/such/folder"}},
            {"name": "prepared", "kind": "expand_vocabulary", "model": "org/chat", "donor": "d"},
            {"name": "tuned", "kind": "instruct", "model": "student", **TRAINING | {"data": "talks"}},
            {"name": "pruned_after", "kind": "prune", "model": "tuned", "data": "text", **cut},
            {"name": "aligned", "kind": "align", "model": "org/chat", **TRAINING | {"data": "pairs"}},
            {"name": "retold", "kind": "distil", "model": "cut", **teacher | {"data": "talks"}},
            {"name": "retold_elsewhere", "kind": "distil", "model": "cut", **teacher | {"data": str(folder)}},
            {"name": "out", "kind": "export", "model": model},
        ],
    )
    context = StageContext(recipe, Path("r.yaml"), recipe.stage("out"), tmp_path / "out", tmp_path, Launch())
    assert taught_to_chat(context, model) is taught
    card = gather_card(context, CONFIG, MEASURED, chat_template=True)
    assert ("chat model with" in model_card(card)) is taught

"""What a distillation's checkpoints say of its teacher."""

from types import SimpleNamespace

import pytest

from minima.disk import write_json
from minima.launcher import Launch
from minima.models.shape import ModelShape
from minima.models.weights import RandomSource, write_folder
from minima.recipe.schema import Recipe
from minima.stages import distil
from minima.stages.context import StageContext
from minima.stages.identity import check_unchanged, describe
from minima.stages.manifest import read_manifest, write_started

SHAPE = {"vocabulary_size": 64, "hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 2}
COMMIT = "0123456789abcdef"


def write_teacher(folder, seed=0):
    source = RandomSource(ModelShape(**SHAPE).to_config(), seed)
    write_folder(folder, source.config, ((name, source.read(name)) for name in source.names()))
    return str(folder)


@pytest.fixture
def said(tmp_path, monkeypatch):
    """What the checkpoints of a stage with some teacher would say of it, once the stage was begun."""
    given = []
    monkeypatch.setattr(distil, "run_training", lambda context, stage, make, facts, **_: given.append(facts))

    def run(teacher, rank=0, folder="student"):
        stage = {
            "name": "student", "kind": "distil", "model": {"random": SHAPE}, "teacher": teacher, "data": "d",
            "batch_sequences": 1, "micro_batch_sequences": 1, "steps": 1, "learning_rate": 1e-4,
        }  # fmt: skip
        recipe = Recipe.model_validate({"name": "x", "stages": [stage]})
        own = tmp_path / folder
        own.mkdir(exist_ok=True)
        description = describe(recipe, recipe.stages[0], tmp_path, {})
        check_unchanged(description, own, recipe)
        write_started(own, description)
        launch = Launch(rank, 2, rank, 2)
        distil.run(StageContext(recipe, tmp_path / "x.yaml", recipe.stages[0], own, tmp_path, launch))
        return given[-1]

    return run


def test_the_hash_of_a_folder_wherever_it_lies(tmp_path, said):
    first = said(write_teacher(tmp_path / "here"))
    inputs = read_manifest(tmp_path / "student", "started.json")["inputs"]
    assert first["teacher_hash"] == inputs[f"teacher ({tmp_path / 'here'})"]
    assert set(first) == {"teacher", "teacher_hash"} and first["teacher"] == str(tmp_path / "here")
    moved = said(write_teacher(tmp_path / "there"), folder="again")
    other = said(write_teacher(tmp_path / "other", seed=1), folder="another")
    assert first["teacher_hash"] == moved["teacher_hash"] != other["teacher_hash"]


def test_the_commit_of_a_hub_model(tmp_path, said, monkeypatch):
    folder = write_teacher(tmp_path / "snapshots" / COMMIT)
    origin = SimpleNamespace(source=SimpleNamespace(config=ModelShape(**SHAPE).to_config()), identity="org/model")
    monkeypatch.setattr(distil, "open_origin", lambda *_: origin)
    write_json(tmp_path / "hub.json", {"org/model@v2": COMMIT, "org/model@default": "another"})
    assert said({"source": "org/model", "revision": "v2"})["teacher_revision"] == COMMIT
    assert "teacher_revision" not in said(folder, folder="again")


def test_of_random_weights_and_on_other_ranks_the_name_alone(tmp_path, said):
    assert list(said({"random": SHAPE})) == ["teacher"]
    assert list(said(write_teacher(tmp_path / "here"), rank=1, folder="again")) == ["teacher"]


def test_what_a_recipe_says_of_the_loss_is_what_is_trained_with(tmp_path, monkeypatch):
    loss = {"hard_weight": 0.2, "soft_weight": 0.6, "temperature": 3.0, "divergence": "skew_forward_kl", "alpha": 0.4,
            "top_k": 7, "top_p": 0.5, "chunk_tokens": 99}  # fmt: skip
    stage = {
        "name": "student", "kind": "distil", "model": {"random": SHAPE}, "teacher": {"random": SHAPE}, "data": "d",
        "batch_sequences": 8, "micro_batch_sequences": 1, "steps": 1, "learning_rate": 1e-4, **loss,
    }  # fmt: skip
    made = []
    monkeypatch.setattr(distil, "Distillation", lambda host, **given: made.append(given))
    monkeypatch.setattr(distil, "_host", lambda *_: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(distil, "TokenStore", SimpleNamespace(open=lambda _: SimpleNamespace(document_mask=False)))
    for check in ("check_fit", "check_tokens", "check_template"):
        monkeypatch.setattr(distil, check, lambda *_, **__: None)
    choice = SimpleNamespace(window_micro_batches=4)
    monkeypatch.setattr(distil, "run_training", lambda context, stage, make, *_, **__: make(tmp_path, None, choice))
    recipe = Recipe.model_validate({"name": "x", "stages": [stage]})
    distil.run(StageContext(recipe, tmp_path / "x.yaml", recipe.stages[0], tmp_path, tmp_path, Launch()))
    assert made == [loss | {"window": 4}]

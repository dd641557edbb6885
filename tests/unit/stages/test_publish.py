"""What goes to the Hub and what does not, against a stand-in of its endpoint."""

import json
import logging
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from minima import cli
from minima.errors import CheckpointError, StageError
from minima.launcher import Launch
from minima.models.checksums import write_checksums
from minima.models.shape import ModelShape
from minima.models.weights import RandomSource, write_folder
from minima.recipe.schema import Recipe
from minima.stages import publish as publish_stage
from minima.stages.context import StageContext
from minima.stages.release.hub_push import publish
from tests.hub import TOKEN, Hub, serve

SHAPE = ModelShape(vocabulary_size=48, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2)
CARD = "---\nlicense: apache-2.0\n---\n\n# chat\n\n## Limits\n\nMany.\n"
FILES = ["README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"]
FILES += ["tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in that this process may reach, with a token that it knows."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serve(Hub()) as hub:
        yield hub


@pytest.fixture
def export(tmp_path):
    """A finished export stage's folder, with a file that nobody else is meant to see."""
    folder = tmp_path / "run" / "chat"
    write(folder / "model")
    for name in ("started.json", "manifest.json"):
        (folder / name).write_text(json.dumps({"stage": {"kind": "export", "name": "chat"}, "metrics": {}}))
    return folder


def write(model: Path, shard_bytes: int = 10**9) -> None:
    source = RandomSource(SHAPE.to_config(), 1)
    write_folder(
        model,
        source.config,
        ((name, source.read(name)) for name in source.names()),
        dtype=torch.float32,
        shard_bytes=shard_bytes,
    )
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).write_text("{}")
    (model / "README.md").write_text(CARD)
    (model / ".env").write_text("PASSWORD=1")
    (model / "tokenizer_notes.txt").write_text("to myself")
    (model / "checkpoints").mkdir()


def cut_off_benchmark(export):
    write_benchmark(export, "chat")
    path = export.parent / "bench" / "benchmark.json"
    path.write_text(path.read_text()[:-9])


def write_benchmark(export: Path, model: str, **task) -> None:
    folder = export.parent / "bench"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({"stage": {"kind": "benchmark", "model": model}}))
    found = {"score": 0.25, "metric": "acc", "filter": "none", "shots": 5, "items": 40, "stderr": 0.01, "version": 2}
    content = {"harness": {"name": "lm-eval", "version": "0.4.13"}, "tasks": {"mmlu": found | task}}
    (folder / "benchmark.json").write_text(json.dumps(content))


def test_a_model_goes_to_a_private_repository_in_one_commit(hub, export):
    pushed = publish(export, "org/chat", endpoint=hub.url)
    repo = hub.repos["org/chat"]
    assert repo.private
    assert len(repo.commits) == 1
    assert repo.commits[0]["message"].startswith("chat, exported by minima")
    files = repo.branches["main"]
    assert sorted(files) == [".gitattributes", *FILES]
    assert all(files[name] == (export / "model" / name).read_bytes() for name in FILES)
    assert pushed.left_out == [".env", "checkpoints", "tokenizer_notes.txt"]
    assert (pushed.url, pushed.commit, pushed.changed) == (f"{hub.url}/org/chat", repo.heads["main"], True)
    assert ".env" in "\n".join(pushed.lines())


def test_the_same_again_makes_no_commit_and_says_so(hub, export):
    first = publish(export, "org/chat", endpoint=hub.url)
    again = publish(export / "model", "org/chat", endpoint=hub.url)
    assert len(hub.repos["org/chat"].commits) == 1
    assert (again.changed, again.commit) == (False, first.commit)
    assert "the Hub has the same files" in again.lines()[-1]


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_an_export_that_has_lost_a_file_is_not_pushed_and_an_edited_one_is(hub, export, name):
    (export / "model" / "tokenizer.model").write_text("with it alone, the tokens would be others")
    write_checksums(export, editable=True)
    (export / "model" / name).unlink()
    with pytest.raises(StageError, match=f"model/{name} no longer exists"):
        publish(export, "org/chat", endpoint=hub.url)
    assert not hub.repos
    (export / "model" / name).write_text('{"edited": 1}')
    assert publish(export, "org/chat", endpoint=hub.url).changed


def test_a_branch_is_made_and_the_rest_of_the_repository_left_alone(hub, export):
    publish(export, "org/chat", endpoint=hub.url, private=False, revision="v2/a", message="second try")
    repo = hub.repos["org/chat"]
    assert not repo.private
    assert sorted(repo.branches["main"]) == [".gitattributes"]
    assert "model.safetensors" in repo.branches["v2/a"]
    assert repo.commits == [{"branch": "v2/a", "message": "second try"}]


def test_files_of_an_earlier_model_go_and_those_of_others_stay(hub, export):
    publish(export, "org/chat", endpoint=hub.url)
    hub.repos["org/chat"].branches["main"] |= {"LICENSE": b"mine", "picture.png": b"mine", "vocab.json": b"old"}
    write(export.parent / "other", shard_bytes=4000)
    pushed = publish(export.parent / "other", "org/chat", endpoint=hub.url)
    files = hub.repos["org/chat"].branches["main"]
    assert pushed.removed == ["model.safetensors", "vocab.json"]
    assert {"model.safetensors.index.json", "LICENSE", "picture.png"} <= set(files)
    assert not {"model.safetensors", "vocab.json"} & set(files)
    assert len(hub.repos["org/chat"].commits) == 2


def test_shards_that_the_index_does_not_name_are_left_out(hub, tmp_path):
    write(tmp_path / "other", shard_bytes=4000)
    (tmp_path / "other" / "model-00009-of-00009.safetensors").write_bytes(b"stale")
    assert "model-00009-of-00009.safetensors" in publish(tmp_path / "other", "org/x", endpoint=hub.url).left_out


@pytest.mark.parametrize("by_path", [False, True])
def test_the_card_gets_the_scores_that_have_come_since(hub, export, by_path):
    write_benchmark(export, str(export / "model") if by_path else "chat")
    publish(export, "org/chat", endpoint=hub.url)
    card = hub.repos["org/chat"].branches["main"]["README.md"].decode()
    assert "| mmlu | acc | 5 | 0.2500 | 0.0100 | 2 |" in card
    [result] = huggingface_hub.ModelCard(card).data.eval_results
    assert (result.metric_value, result.source_name) == (0.25, "lm-eval 0.4.13")
    assert (export / "model" / "README.md").read_text() == CARD, "a finished stage stays as it is"


@pytest.mark.parametrize("model", ["other", "other/model"])
def test_scores_of_another_model_stay_away(hub, export, model):
    write_benchmark(export, model)
    publish(export, "org/chat", endpoint=hub.url)
    assert hub.repos["org/chat"].branches["main"]["README.md"].decode() == CARD


@pytest.mark.parametrize(("task", "mark"), [({"limited": True}, "40 items"), ({"stand_in": True}, "stand-in items")])
def test_what_is_no_whole_score_is_no_result_for_the_hub(hub, export, task, mark):
    write_benchmark(export, "chat", **task)
    publish(export, "org/chat", endpoint=hub.url)
    card = hub.repos["org/chat"].branches["main"]["README.md"].decode()
    assert f"mmlu ({mark})" in card
    assert "model-index" not in card


@pytest.mark.parametrize(
    ("begin", "status", "words"),
    [
        ("/api/repos/create", 403, "does not let this token write"),
        ("/api/models/org/chat/preupload", 403, "does not let this token write"),
        ("/api/models/org/chat/commit", 403, "write permission from a member of org"),
        ("/api/models/org/chat", 401, "does not recognise the token"),
        ("/api/models/org/chat/commit", 412, "status 412"),
    ],
)
def test_a_refusal_is_told_and_nothing_is_pushed(hub, export, begin, status, words):
    hub.refuse, hub.words = {begin: status}, f"bad token {TOKEN}"
    with pytest.raises(StageError, match=words) as error:
        publish(export, "org/chat", endpoint=hub.url)
    assert TOKEN not in str(error.value)
    assert error.value.__cause__ is None
    assert not any(repo.commits for repo in hub.repos.values())


def test_a_refusal_tells_of_the_new_repository_that_stays(hub, export):
    hub.refuse = {"/api/repos/create": 403}
    with pytest.raises(StageError) as error:
        publish(export, "org/chat", endpoint=hub.url)
    assert "stays" not in str(error.value)
    hub.refuse = {"/api/models/org/chat/commit": 403}
    with pytest.raises(StageError, match="the new repository org/chat stays on the Hub, empty"):
        publish(export, "org/chat", endpoint=hub.url)
    assert "org/chat" in hub.repos
    with pytest.raises(StageError, match="write permission") as error:
        publish(export, "org/chat", endpoint=hub.url)
    assert "stays" not in str(error.value), "this push found it there"


def test_a_name_that_is_no_model_of_theirs_is_told(hub, export):
    hub.taken = {"org/chat"}
    with pytest.raises(StageError, match=r"no model repository org/chat .*\n.*taken by a dataset") as error:
        publish(export, "org/chat", endpoint=hub.url)
    assert "stays" not in str(error.value)


def test_a_token_that_the_hub_does_not_know(hub, export, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(StageError, match="does not recognise the token") as error:
        publish(export, "org/chat", endpoint=hub.url)
    assert "hf_other" not in str(error.value)


def test_without_a_token_the_hub_is_not_asked(hub, export, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(StageError, match="no token for the Hub"):
        publish(export, "org/chat", endpoint=hub.url)
    assert not hub.requests


def test_no_way_to_the_hub(hub, export, monkeypatch):
    with pytest.raises(StageError, match="check the network"):
        publish(export, "org/chat", endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StageError, match="HF_HUB_OFFLINE"):
        publish(export, "org/chat", endpoint=hub.url)


def test_a_file_that_the_repository_ignores_is_not_passed_over(hub, export):
    publish(export, "org/chat", endpoint=hub.url)
    repo = hub.repos["org/chat"]
    repo.branches["main"] = {".gitignore": b"*.safetensors"}
    hub.ignored = {"model.safetensors"}
    publish(export, "org/chat", endpoint=hub.url)
    assert sorted(repo.branches["main"]) == [".gitignore", *FILES]


def damage_weights(export):
    path = export / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (damage_weights, CheckpointError, "cannot be read as safetensors"),
        (lambda export: (export / "model" / "README.md").unlink(), StageError, "has no README.md"),
        (lambda export: (export / "model" / "README.md").write_text("---\na: [\n---\n"), StageError, "front matter"),
        (lambda export: (export / "model" / "README.md").write_bytes(b"\xff"), StageError, "front matter"),
        (cut_off_benchmark, StageError, "bench/benchmark.json cannot be read"),
        (lambda export: (export / "manifest.json").unlink(), StageError, "not finished"),
        (
            lambda export: (export / "manifest.json").write_text('{"stage": {"kind": "prune"}}'),
            StageError,
            "stage of kind prune",
        ),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_before_the_hub_is_asked(hub, export, damage, error, words):
    damage(export)
    for folder in (export, export / "model"):
        with pytest.raises(error, match=words):
            publish(folder, "org/chat", endpoint=hub.url)
    assert not hub.requests


@pytest.mark.parametrize("repo", ["chat", "org/chat/x", "org/", "-x/y", "org/ch at"])
def test_names_that_the_hub_cannot_have(hub, export, repo):
    with pytest.raises(StageError, match="is not a repository name"):
        publish(export, repo, endpoint=hub.url)
    assert not hub.requests


def test_the_stage_pushes_what_the_recipe_says(hub, export, monkeypatch, caplog):
    recipe = Recipe(
        name="run",
        stages=[
            {"name": "chat", "kind": "export", "model": "t"},
            {"name": "out", "kind": "publish", "model": "chat", "repo": "org/chat", "private": False, "message": "m"},
        ],
    )
    monkeypatch.setattr(publish_stage, "publish", lambda *given, **named: publish(*given, **named, endpoint=hub.url))
    caplog.set_level(logging.INFO, logger="minima")
    run_folder = export.parent
    context = StageContext(recipe, Path("r.yaml"), recipe.stage("out"), run_folder / "out", run_folder, Launch())
    metrics = publish_stage.run(context)
    assert hub.repos["org/chat"].commits == [{"branch": "main", "message": "m"}]
    assert not hub.repos["org/chat"].private
    assert metrics["commit"] in caplog.text
    assert json.loads(json.dumps(metrics)) == metrics


def test_the_command_says_where_it_went_and_never_the_token(hub, export, monkeypatch, capfd):
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # what HF_ENDPOINT sets when huggingface_hub is imported
    assert (
        cli.main(["publish", str(export), "--push", "org/chat", "--public", "--revision", "b", "--message", "m"]) == 0
    )
    repo = hub.repos["org/chat"]
    assert (repo.private, repo.commits) == (False, [{"branch": "b", "message": "m"}])
    hub.refuse, hub.words = {"/api/models": 403}, f"not with {TOKEN}"
    assert cli.main(["publish", str(export), "--push", "org/chat"]) == cli.USER_ERROR
    shown = capfd.readouterr()
    assert f"{hub.url}/org/chat (public) is at commit {repo.heads['b']}" in shown.out
    assert "not with ***" in shown.err
    assert TOKEN not in shown.out + shown.err


def test_the_command_needs_a_repository(capsys):
    with pytest.raises(SystemExit):
        cli.main(["publish", "somewhere"])
    assert "--push" in capsys.readouterr().err
    assert cli.main(["publish", "no/such/folder", "--push", "org/chat"]) == cli.USER_ERROR

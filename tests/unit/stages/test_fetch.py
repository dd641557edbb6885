"""Fetching what a recipe reads from a stand-in for the Hub, and finding it again without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from minima.errors import StageError
from minima.stages import fetch as module
from minima.stages.fetch import FETCHED, LEFT, LOCAL, MISSING, THERE, fetch
from tests.hub_downloads import COMMIT, Downloads, serve

ROOT = Path(__file__).parents[3]
MODEL = {
    "config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights" * 100, "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}", "pytorch_model.bin": b"a pickle",
}  # fmt: skip
TEXT = "".join(json.dumps({"text": f"line {number}"}) + "\n" for number in range(20)).encode()
CORPUS = {"name": "corpus", "kind": "build_data", "tokenizer": "org/words", "sequence_length": 64}
TEACHER = {
    "name": "teacher",
    "kind": "adapt",
    "model": "org/model",
    "data": "corpus",
    "tokens": 64,
    "batch_sequences": 1,
    "micro_batch_sequences": 1,
    "learning_rate": 1e-4,
}


@pytest.fixture
def hub():
    with serve(Downloads()) as hub:
        hub.repos["models/org/model"] = dict(MODEL)
        hub.repos["models/org/words"] = dict(MODEL)
        hub.repos["datasets/org/text"] = {"train.jsonl": TEXT, "README.md": b"---\nlicense: mit\n---\n"}
        yield hub


@pytest.fixture
def place(tmp_path, hub):
    """A folder with a cache of its own; `call` is `minima` there, as on a login node."""

    class Place:
        cache = tmp_path / "home" / "hub"

        def recipe(self, *stages, **more):
            content = {"name": "x", "output": "out", "stages": list(stages)} | more
            (tmp_path / "x.yaml").write_text(yaml.safe_dump(content))

        def python(self, *arguments, **variables):
            environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
            environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
            environment |= {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_" + "nobodynobody"} | variables
            command = [sys.executable, *arguments]
            return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

        def fetch(self, *arguments, **variables):
            return self.python("-m", "minima", "fetch", "x.yaml", *arguments, **variables)

    return Place()


def corpus(*sources):
    return CORPUS | {"sources": list(sources)}


@pytest.mark.slow
def test_models_tokenizers_and_data_sets_are_there_for_a_job_without_a_network(place, hub, tmp_path):
    (tmp_path / "questions.jsonl").touch()
    answers = [{"format": "mt_bench", "questions": "questions.jsonl"}]
    measured = {"name": "asked", "kind": "benchmark", "model": "org/model", "answers": answers}
    place.recipe(corpus({"hub": "org/text"}, {"embedded": "sotu"}), TEACHER, measured)
    done = place.fetch()
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"corpus: tokenizer org/words, commit {COMMIT[:12]}: {FETCHED} (3 files")
    assert lines[1].startswith(f"corpus: data set org/text (train): {FETCHED} (")
    assert lines[2] == f"corpus: text sotu: {LOCAL} (minima ships it)"
    assert lines[3].startswith(f"teacher: model org/model, commit {COMMIT[:12]}: {FETCHED} (4 files")
    assert lines[4].startswith(f"asked: model org/model, commit {COMMIT[:12]}: {THERE}")
    assert "hf_nobody" not in done.stdout + done.stderr
    assert json.loads((tmp_path / "out" / "hub.json").read_text())["org/model@default"] == COMMIT
    files = {path.name for path in place.cache.glob(f"models--org--model/snapshots/{COMMIT}/*")}
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}, "and no pickle"

    claimed = (tmp_path / "out" / "recipe.yaml").read_bytes()
    again = place.fetch("stages.teacher.seed=7")
    assert (tmp_path / "out" / "recipe.yaml").read_bytes() == claimed, "a run may be at work with its own"
    assert again.returncode == 0 and again.stdout.count(f": {THERE}") == 4 and FETCHED + " (" not in again.stdout

    asked = len(hub.requests)
    code = (
        "from pathlib import Path; from minima.stages.hub import snapshot; from minima.data.documents import Rejected\n"
        "from minima.data.sources import read_source; from minima.recipe.data import Source\n"
        "print(snapshot('org/model', None, Path('out'), keep=False))\n"
        "print(len(list(read_source(Source(hub='org/text'), Rejected()))))"
    )
    offline = place.python("-c", code, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert offline.stdout.split()[-2:] == [str(place.cache / f"models--org--model/snapshots/{COMMIT}"), "20"]
    assert len(hub.requests) == asked


def test_only_what_the_chosen_stages_read(place):
    place.recipe(corpus({"embedded": "sotu"}), TEACHER)
    done = place.fetch("--stages", "corpus")
    assert done.returncode == 0, done.stderr
    assert "org/words" in done.stdout and not list(place.cache.glob("models--org--model"))


def test_a_model_that_there_is_not_ends_it(place):
    place.recipe(corpus({"embedded": "sotu"}), TEACHER | {"model": "org/other"})
    done = place.fetch()
    assert done.returncode == 2
    assert "StageError: model 'org/other' was not found: " in done.stderr


def test_what_a_login_node_downloads_needs_no_torch(place):
    place.recipe(corpus({"embedded": "sotu"}), TEACHER)
    code = (
        "import sys; from pathlib import Path; from minima.stages.fetch import fetch\n"
        "assert fetch(Path('x.yaml'), [], None, print) == 0; assert 'torch' not in sys.modules"
    )
    done = place.python("-c", code)
    assert done.returncode == 0, done.stderr


# -- without the Hub -------------------------------------------------------------------------------------------------


@pytest.fixture
def said(tmp_path, monkeypatch):
    """Fetch a recipe of these stages in this process: its exit code, and what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "tokenizer").mkdir()

    def go(*stages):
        (tmp_path / "x.yaml").write_text(yaml.safe_dump({"name": "x", "output": "out", "stages": list(stages)}))
        lines: list[str] = []
        code = fetch(tmp_path / "x.yaml", [], None, lines.append)
        return code, lines

    return go


def test_local_inputs_are_looked_for(said, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    local = CORPUS | {"tokenizer": "tokenizer"}
    code, lines = said(local | {"sources": [{"path": "*.txt"}]})
    assert code == 0 and lines[:2] == [
        f"corpus: tokenizer tokenizer: {LOCAL}",
        f"corpus: files *.txt: {LOCAL} (1 files)",
    ]
    assert not (tmp_path / "out").exists(), "nothing is written for a run that needs nothing"
    code, lines = said(local | {"sources": [{"path": "no/such/*.txt"}]})
    assert code == 1 and f"files no/such/*.txt: {MISSING}" in lines[1]
    code, lines = said(TEACHER | {"model": "tokenizer", "data": "runs/other/corpus"})
    assert code == 1 and f"data runs/other/corpus: {MISSING}" in "\n".join(lines)


def test_a_streamed_data_set_cannot_be_fetched(said):
    code, lines = said(CORPUS | {"tokenizer": "tokenizer", "sources": [{"hub": "org/text", "streaming": True}]})
    assert code == 1 and f"data set org/text (train): {LEFT} (it is streamed" in lines[1]
    assert "1 input is missing for a job without a network" in lines[-1]


@pytest.mark.slow
def test_what_lm_eval_cannot_get_is_told(said, tmp_path):
    (tmp_path / "model").mkdir()
    stage = {"name": "scores", "kind": "benchmark", "model": "model", "tasks": ["no_such_task"]}
    code, lines = said(stage)
    assert code == 1 and f"benchmarks no_such_task: {LEFT} (lm-eval: " in lines[1]


def test_the_suite_without_leave_to_execute(said, monkeypatch, tmp_path):
    (tmp_path / "model").mkdir()
    asked = []
    monkeypatch.setattr(
        module.subprocess, "run", lambda command, **more: asked.append(command) or subprocess.CompletedProcess([], 0)
    )
    code, lines = said({"name": "scores", "kind": "benchmark", "model": "model", "suite": "minima"})
    assert code == 0 and "benchmark humaneval: left out" in lines[1]
    assert asked[0][-1] == "mmlu,ceval-valid,minima_drop,minima_bbh,gsm8k_cot"


def test_offline_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StageError, match="HF_HUB_OFFLINE=1 is set"):
        fetch(tmp_path / "x.yaml", [], None, print)

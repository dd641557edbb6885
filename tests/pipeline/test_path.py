"""The whole path with real ranks: text in, an exported student out; ended in the middle and taken up again."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minima.models.weights import FolderSource, write_folder

pytestmark = pytest.mark.ranks

SHAPE = "{vocabulary_size: 320, hidden_size: 32, intermediate_size: 48, num_layers: 4, num_heads: 4, max_positions: 64}"
RECIPE = f"""
name: tiny
ranks: 2
stages:
  - name: corpus
    kind: build_data
    sources: [{{path: text/*.jsonl}}]
    tokenizer: {{vocabulary_size: 320}}
    sequence_length: 32
    held_out_fraction: 0.1
  - &teacher
    name: teacher
    kind: adapt
    model: {{random: {SHAPE}}}
    data: corpus
    batch_sequences: 8
    micro_batch_sequences: 2
    steps: 12
    learning_rate: 3e-3
    precision: float32
    checkpoint_every_steps: 6
    evaluate_every_steps: 6
    log_every_steps: 4
  - &pruned
    name: pruned
    kind: prune
    model: teacher
    data: corpus
    target: {{num_layers: 3, hidden_size: 24, num_heads: 3, intermediate_size: 32}}
    sequences: 10
    micro_batch_sequences: 2
    precision: float32
  - {{<<: *pruned, name: pruned_smaller, scores: pruned, target: {{hidden_size: 16, num_heads: 2}}}}
  - &student
    <<: *teacher
    name: student
    kind: distil
    model: pruned
    teacher: {{source: teacher, placement: zero3, precision: float32}}
    steps: 80
    precision: bfloat16
    activation_checkpointing: full
    checkpoint_every_steps: 20
    evaluate_every_steps: 40
    keep_checkpoints: 0
    log_every_steps: 1
  - {{<<: *student, name: undisturbed, teacher: {{source: teacher, precision: float32}}}}  # placement auto
  - {{name: quality, kind: evaluate, models: [teacher, pruned, student, student@20], teacher: teacher, data: corpus}}
  - {{name: out, kind: export, model: student, dtype: float32}}
summary:
  student: {{loss: quality.student.loss, mean: [quality.teacher.loss, quality.pruned.loss]}}
"""
# Large members of a family have more rows of no token than small ones.
PADDED = """
name: padded
ranks: 2
stages:
  - &student
    name: own
    kind: distil
    model: runs/tiny/pruned
    teacher: runs/tiny/out/model
    data: runs/tiny/corpus
    batch_sequences: 8
    micro_batch_sequences: 2
    steps: 3
    learning_rate: 1e-3
    log_every_steps: 1
  - {<<: *student, name: padded, teacher: more_rows}
  - {<<: *student, name: student_padded, model: more_rows}
  - {name: quality, kind: evaluate, models: [runs/tiny/out/model, more_rows], teacher: more_rows,
     data: runs/tiny/corpus}
"""


def write_text(folder: Path) -> None:
    """Sentences with some order in them, so that training has something to learn."""
    words = random.Random(0)
    nouns, verbs = ("cat", "dog", "bird", "fish", "horse"), ("sees", "hears", "likes", "follows")
    folder.mkdir()
    with open(folder / "a.jsonl", "w") as file:
        for _ in range(300):
            sentence = " ".join(
                f"The {words.choice(nouns)} {words.choice(verbs)} the {words.choice(nouns)}." for _ in range(6)
            )
            file.write(json.dumps({"text": sentence}) + "\n")
        file.write("not json\n" + json.dumps({"text": 3}) + "\n")


class Place:
    """A folder that a user works in, outside of the clone."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs, self.run_folder = folder, folder / "runs", folder / "runs" / "tiny"
        write_text(folder / "text")
        (folder / "tiny.yaml").write_text(RECIPE)
        self.environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}

    def start(self, *arguments: str, recipe: str = "tiny.yaml") -> subprocess.Popen:
        command = [sys.executable, "-m", "minima", "run", recipe, *arguments]
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *arguments: str, recipe: str = "tiny.yaml") -> str:
        process = self.start(*arguments, recipe=recipe)
        output = process.communicate(timeout=400)[0]
        assert process.returncode == 0, output[-4000:]
        return output

    def manifest(self, stage: str, run: str = "tiny") -> dict:
        return json.loads((self.runs / run / stage / "manifest.json").read_text())

    def records(self, stage: str, run: str = "tiny") -> list[dict]:
        path = self.runs / run / stage / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The path, ended while the student trains, and taken up again by another launcher."""
    place = Place(tmp_path_factory.mktemp("path"))
    process = place.start()
    deadline = time.monotonic() + 300
    while not any(record["step"] >= 25 for record in place.records("student")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-4000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    place.first_output = process.communicate(timeout=60)[0]
    place.first_code = process.returncode
    place.steps_when_ended = max(record["step"] for record in place.records("student"))
    later = (place.run_folder / "student" / "manifest.json", place.run_folder / "undisturbed")
    place.there_when_ended = [path.exists() for path in later]
    place.second_output = place.run("--launcher", "torchrun")
    return place


def test_ended_in_the_middle_it_says_so(place):
    assert place.first_code != 0
    assert 25 <= place.steps_when_ended < 80
    assert place.there_when_ended == [False, False]


def test_taken_up_again_it_equals_the_undisturbed_run_to_the_bit(place):
    assert "already finished: corpus, teacher, pruned, pruned_smaller" in place.second_output
    assert "student: resuming after step" in place.second_output
    resumed, undisturbed = (
        place.run_folder / name / "checkpoints/step-00000080" for name in ("student", "undisturbed")
    )
    hashes = [json.loads((folder / "checkpoint.json").read_text())["sha256"] for folder in (resumed, undisturbed)]
    assert {name for name in hashes[0] if "weights" in name or "exp_avg" in name}
    assert hashes[0] == hashes[1]
    losses = [
        {record["step"]: record["loss"] for record in place.records(stage) if "loss" in record}
        for stage in ("student", "undisturbed")
    ]
    assert losses[0] == losses[1] and sorted(losses[0]) == list(range(1, 81))


def test_every_stage_says_what_it_did(place):
    corpus = place.manifest("corpus")["metrics"]
    assert corpus["rejected"] == {"broken_json": 1, "not_text": 1}
    teacher, student = (place.manifest(name)["metrics"] for name in ("teacher", "student"))
    assert teacher["tokens"] == 12 * 8 * 32 and student["tokens"] == 80 * 8 * 32
    quality = place.manifest("quality")["metrics"]
    assert quality["student"]["loss"] < quality["pruned"]["loss"] - 0.1
    assert quality["student"]["loss"] != quality["student@20"]["loss"]
    assert quality["teacher"]["kl"] == pytest.approx(0, abs=1e-6) and quality["teacher"]["top1_agreement"] == 1
    # The held-out loss at the end of training, by the trained engine, and by the evaluate stage, from the checkpoint.
    assert teacher["held_out_loss"] == pytest.approx(quality["teacher"]["loss"], rel=1e-5)
    assert quality["teacher"]["parameters"] > 2 * place.manifest("pruned_smaller")["metrics"]["parameters"]


def test_whoever_may_use_the_folder_may_use_all_of_it(place):
    reference = (place.run_folder / "recipe.yaml").stat().st_mode
    modes = {path: path.stat().st_mode for path in place.run_folder.rglob("*") if path.is_file()}
    assert {"checkpoint.json", "scores.safetensors", "model.safetensors", "lock"} <= {path.name for path in modes}
    assert not [path for path, mode in modes.items() if mode != reference]


def test_the_scores_were_reused_without_a_pass(place):
    first, second = (place.run_folder / name / "scores.safetensors" for name in ("pruned", "pruned_smaller"))
    assert first.read_bytes() == second.read_bytes()


def test_the_export_is_the_student(place):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from minima.engine.weights import open_weights
    from minima.models.causal_lm import load_plain

    folder = place.run_folder / "out" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("The cat sees the dog.", return_tensors="pt").input_ids
    trained = load_plain(open_weights(place.run_folder / "student"))
    with torch.no_grad():
        assert model(tokens).logits.equal(trained(tokens).logits)
    assert model.config.num_hidden_layers == 3 and model.config.num_key_value_heads == 3
    card = (folder / "README.md").read_text()
    assert "the recipe `tiny`" in card and f"{80 * 8 * 32:,}" in card


def test_the_summary_holds_what_the_recipe_asks_for(place):
    summary = json.loads((place.run_folder / "summary.json").read_text())
    quality = place.manifest("quality")["metrics"]
    assert summary["student"]["loss"] == quality["student"]["loss"]
    assert summary["student"]["mean"] == pytest.approx((quality["teacher"]["loss"] + quality["pruned"]["loss"]) / 2)
    assert Path(place.folder / summary["export"]["out"]).resolve() == (place.run_folder / "out" / "model").resolve()
    assert summary["tokens"] == (12 + 80 + 80) * 8 * 32


def test_rows_of_no_token_change_nothing(place):
    (place.folder / "padded.yaml").write_text(PADDED)
    model, padded = place.run_folder / "out" / "model", place.folder / "more_rows"
    shutil.copytree(model, padded)
    source = FolderSource(model)
    tensors = {name: source.read(name) for name in source.names()}
    rows = {name: tensor for name, tensor in tensors.items() if tensor.shape[0] == 320}
    tensors |= {name: torch.cat([old, torch.full((8, old.shape[1]), 0.1)]) for name, old in rows.items()}
    write_folder(padded, source.config | {"vocab_size": 328}, tensors.items())
    output = place.run(recipe="padded.yaml")
    assert output.count("more_rows: the last 8 of its 328 vocabulary rows are ignored") == 3

    losses, with_padded = ([record["loss"] for record in place.records(name, "padded")] for name in ("own", "padded"))
    assert len(losses) == 3 and losses == with_padded
    size = sum(tensor.numel() for tensor in tensors.values())
    sizes = place.manifest("student_padded", "padded")["metrics"]["parameters"], size
    scores = place.manifest("quality", "padded")["metrics"]
    assert sizes == (scores["runs/tiny/out/model"]["parameters"], scores["more_rows"]["parameters"])
    for name in ("runs/tiny/out/model", "more_rows"):
        assert abs(scores[name]["kl"]) < 1e-6 and scores[name]["top1_agreement"] == 1


def test_a_second_call_says_that_all_is_done_and_changes_nothing(place):
    before = {path: path.stat().st_mtime_ns for path in place.run_folder.rglob("*") if path.name == "manifest.json"}
    output = place.run()
    assert "all done" in output
    assert before == {path: path.stat().st_mtime_ns for path in before} and len(before) == 8


def test_a_changed_input_is_refused_by_name(place):
    process = place.start("stages.corpus.sequence_length=16")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and "sequence_length is 16 and was 32" in output

"""From English text to a bilingual chat model with real ranks: every stage of the chat half, in one process group."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from minima.launcher import child_environment
from tests.pipeline.test_path import write_text

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]
TRAINING = """
    batch_sequences: 8
    micro_batch_sequences: 2
    precision: float32
    tensorboard: false
    log_every_steps: 1"""
RECIPE = f"""
name: tiny-chat
ranks: 2
stages:
  - name: english
    kind: build_data
    sources: [{{path: text/*.jsonl}}]
    tokenizer: {{vocabulary_size: 320}}
    sequence_length: 32
    held_out_fraction: 0.1
  - name: base
    kind: adapt
    model: {{random: {{vocabulary_size: 320, hidden_size: 32, intermediate_size: 48, num_layers: 2, num_heads: 4,
                       max_positions: 64}}}}
    data: english
    steps: 10
    learning_rate: 3e-3{TRAINING}
  - name: expanded
    kind: expand_vocabulary
    model: base
    donor: {{vocabulary_size: 310, sources: [{{path: chinese.jsonl}}]}}
    script: han
    size: 384
    report_on: [{{name: english, path: text/*.jsonl}}, {{name: chinese, path: chinese.jsonl}}]
    held_out_fraction: 0.1
  - name: corpus
    kind: build_data
    sources: [{{path: text/*.jsonl}}, {{path: chinese.jsonl}}]
    tokenizer: expanded
    sequence_length: 32
    held_out_fraction: 0.1
  - name: teacher
    kind: adapt
    model: expanded
    data: corpus
    steps: 20
    evaluate_every_steps: 20
    learning_rate: 3e-3{TRAINING}
  - name: talks
    kind: build_data
    format: conversations
    sources: [{{path: talks.jsonl}}]
    tokenizer: expanded
    chat_template: minichat
    sequence_length: 64
    held_out_fraction: 0.1
  - name: chat
    kind: instruct
    model: teacher
    data: talks
    neftune_alpha: 5
    steps: 120
    evaluate_every_steps: 40
    patience: 3
    learning_rate: 1e-2{TRAINING}
  - name: too_fast
    kind: instruct
    model: chat
    data: talks
    batch_sequences: 8
    micro_batch_sequences: 2
    learning_rate: 0.2
    schedule: constant
    warmup_fraction: 0
    precision: float32
    steps: 40
    evaluate_every_steps: 2
    patience: 2
  - name: chat_distilled
    kind: distil
    model: teacher
    teacher: chat
    data: talks
    steps: 10
    learning_rate: 3e-3{TRAINING}
  - name: pairs
    kind: build_data
    format: preferences
    sources: [{{path: pairs.jsonl}}]
    tokenizer: expanded
    chat_template: minichat
    sequence_length: 96
    held_out_fraction: 0.1
  - &aligned
    name: aligned
    kind: align
    model: chat
    data: pairs
    steps: 10
    evaluate_every_steps: 5
    learning_rate: 1e-3{TRAINING}
  - {{<<: *aligned, name: aligned_kept, precompute_reference: true}}
  - {{name: quality, kind: evaluate, models: [teacher, chat, chat_distilled, aligned], data: talks}}
  - {{name: out, kind: export, model: aligned}}
summary:
  vocabulary: {{before: expanded.vocabulary_before, after: expanded.vocabulary}}
"""


def write_chat(folder: Path) -> None:
    """Chinese sentences, questions whose answer is their last word, and pairs of a right and a wrong answer."""
    words = random.Random(1)
    people, things = "我你他她", "山水花月鸟鱼"
    with open(folder / "chinese.jsonl", "w") as file:
        for _ in range(300):
            text = "".join(f"{words.choice(people)}看见{words.choice(things)}。" for _ in range(8))
            file.write(json.dumps({"text": text}) + "\n")
    animals = ("cat", "dog", "bird", "fish", "horse")
    with open(folder / "talks.jsonl", "w") as talks, open(folder / "pairs.jsonl", "w") as pairs:
        for number in range(400):
            animal, other = words.sample(animals, 2)
            question, answer = f"Who sees the {animal}? {number}", f"The {animal}."
            turns = [{"User": question, "Assistant": answer}] * (1 + number % 2)
            talks.write(json.dumps(turns) + "\n")
            prompt = [{"role": "user", "content": question}]
            pair = {"prompt": prompt, "chosen": answer, "rejected": f"No {other}!"}
            pairs.write(json.dumps(pair) + "\n")
        talks.write(json.dumps([{"User": "Who?", "Assistant": " "}]) + "\n")
        pairs.write(json.dumps({"prompt": "Who?", "chosen": "I.", "rejected": "I."}) + "\n")


class Place:
    """Where the run lies."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run_folder = folder, folder / "runs" / "tiny-chat"
        write_text(folder / "text")
        write_chat(folder)
        (folder / "tiny-chat.yaml").write_text(RECIPE)

    def command(self, *arguments: str, text: str = "") -> subprocess.CompletedProcess:
        environment = child_environment(2) | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(
            arguments, cwd=self.folder, env=environment, input=text, capture_output=True, text=True, timeout=400
        )

    def metrics(self, stage: str) -> dict:
        return json.loads((self.run_folder / stage / "manifest.json").read_text())["metrics"]

    def records(self, stage: str) -> list[dict]:
        return [json.loads(line) for line in (self.run_folder / stage / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """All stages, by one launcher in one process group."""
    place = Place(tmp_path_factory.mktemp("chat"))
    done = place.command("bash", str(ROOT / "launch" / "torchrun.sh"), "tiny-chat.yaml")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    done = place.command(sys.executable, "-m", "minima", "run", "tiny-chat.yaml")
    assert done.returncode == 0 and "all done" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    return place


def test_the_vocabulary_grew_and_chinese_got_shorter(place):
    found = place.metrics("expanded")
    assert (found["vocabulary_before"], found["vocabulary"]) == (320, 384)
    assert found["tokens_per_character"]["chinese"]["after"] < 0.7 * found["tokens_per_character"]["chinese"]["before"]
    english = found["tokens_per_character"]["english"]
    assert english["before"] == english["after"]


def test_bad_records_are_counted(place):
    assert sum(place.metrics("talks")["rejected"].values()) == 1
    assert sum(place.metrics("pairs")["rejected"].values()) == 1


def test_it_learns_to_answer_and_so_does_a_student_of_it(place):
    quality = place.metrics("quality")
    assert quality["chat"]["loss"] < quality["teacher"]["loss"] - 0.5
    assert quality["chat"]["loss"] < quality["chat_distilled"]["loss"] < quality["teacher"]["loss"] - 0.3
    found = place.metrics("chat")
    assert 0 < found["learnt_tokens"] < found["tokens"] / 2, "questions, markers and padding are not learnt"
    each = place.metrics("talks")["learnt_tokens"] / place.metrics("talks")["blocks"]
    assert found["learnt_tokens"] == pytest.approx(found["sequences"] * each, rel=0.05), "of the whole run"
    assert quality["chat"]["tokens"] < place.metrics("talks")["held_out_tokens"] / 2


def test_a_run_that_gets_worse_ends_and_leaves_its_best_checkpoint(place):
    found, records = place.metrics("too_fast"), place.records("too_fast")
    losses = {record["step"]: record["held_out_loss"] for record in records if "held_out_loss" in record}
    best = min(losses, key=losses.get)
    assert max(losses) == best + 4 < 40, losses
    assert found["step"] == best and found["held_out_loss"] == losses[best]
    folder = place.run_folder / "too_fast"
    kept = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    assert kept[-1] == f"step-{best:08d}"
    assert json.loads((folder / "ended.json").read_text())["step"] == best + 4


def test_killed_before_its_manifest_it_is_not_trained_again(place):
    folder = place.run_folder / "too_fast"
    metrics, manifest = (folder / "metrics.jsonl").read_bytes(), folder / "manifest.json"
    before = json.loads(manifest.read_text())["metrics"]
    manifest.unlink()
    done = place.command("bash", str(ROOT / "launch" / "torchrun.sh"), "tiny-chat.yaml", "--stages", "too_fast")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    assert json.loads(manifest.read_text())["metrics"] == before


def test_alignment_starts_at_log_two_and_learns_the_preference(place):
    first = next(record for record in place.records("aligned") if "loss" in record)
    assert first["loss"] == pytest.approx(0.6931, abs=2e-3) and first["step"] == 1
    found = place.metrics("aligned")
    assert found["held_out_accuracy"] > 0.6 and found["held_out_margin"] > 0
    assert found["held_out_loss"] < 0.69


def test_a_kept_reference_gives_the_same_losses(place):
    names = ("aligned", "aligned_kept")
    runs = [[record["loss"] for record in place.records(name) if "loss" in record] for name in names]
    assert runs[0] == pytest.approx(runs[1], rel=1e-5) and len(runs[0]) == 10
    assert len(list((place.run_folder / "cache").glob("*.safetensors"))) >= 1


def test_transformers_own_pipeline_talks_to_the_export(place):
    from transformers import pipeline

    folder = place.run_folder / "out" / "model"
    chat = pipeline("text-generation", model=str(folder), device="cpu")
    messages = [{"role": "user", "content": "Who sees the cat? 3"}]
    reply = chat(messages, max_new_tokens=20)[0]["generated_text"]
    assert [turn["role"] for turn in reply] == ["user", "assistant"]
    assert reply[1]["content"].strip().startswith("The "), reply
    assert "[|" not in reply[1]["content"] and "</s>" not in reply[1]["content"]


def test_minima_chat_answers_line_by_line(place):
    done = place.command(
        sys.executable, "-m", "minima", "chat", str(place.run_folder / "out"), text="Who sees the cat? 3\n/exit\n"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "The " in done.stdout and "Traceback" not in done.stderr

"""lm-eval itself on a small model: one real start of it, shared by all tests here, checked against transformers."""

import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytest.importorskip("lm_eval")

from minima.errors import StageError
from minima.launcher import Launch
from minima.recipe.schema import Recipe
from minima.stages import benchmark
from minima.stages.context import StageContext

SHOTS = 2
TASKS = ["choice", "hub_drop", "minima_continuation", "local_mmlu", "stand_in_ceval", "local_drop", "stand_in_bbh",
         "local_gsm8k", "local_humaneval"]  # fmt: skip
NO_DATE = {"day": "", "month": "", "year": ""}
QUESTIONS = ("What does the {} see", "Whom does the {} hear", "What would the {} like")
ANIMALS = ("cat", "dog", "bird", "fish", "horse", "cow")
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


def items(count: int, seed: int) -> list[dict]:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        choices = [f"the {word} {draw.choice(('there', 'at home', 'here'))}" for word in draw.sample(ANIMALS, 4)]
        asked = draw.choice(QUESTIONS).format(draw.choice(ANIMALS))
        rows.append({"question": asked, "choices": choices, "answer": draw.randrange(4)})
    return rows


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(folder: Path) -> None:
    """A random Llama whose choices differ, and a byte-level tokenizer trained on the questions."""
    text = [f"{row['question']}? {' '.join(row['choices'])}" for row in items(200, 9)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(3)
    config = LlamaConfig(vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=4096, initializer_range=0.3,
                         eos_token_id=0, bos_token_id=None)  # fmt: skip
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data[0] *= 4  # the end token is likely soon: a thousand random ones cost seconds
    model.save_pretrained(folder)


def write_tasks(folder: Path) -> None:
    rows = {"test": items(20, 1), "dev": items(4, 2)}
    for split, content in rows.items():
        write_lines(folder / f"{split}.jsonl", content)
    task = {
        "task": "choice",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {split: str(folder / f"{split}.jsonl") for split in rows},
            "cache_dir": str(folder / ".cache"),
        },
        "test_split": "test",
        "fewshot_split": "dev",
        "fewshot_config": {"sampler": "first_n"},
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}?",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 7.0},
    }
    (folder / "choice.yaml").write_text(yaml.safe_dump(task))


def write_hub_drop(folder: Path, task_files: Path) -> None:
    """The task that reads DROP from the Hub, given records in the Hub's form from this machine."""
    splits = {"train": range(4), "validation": range(4, 6)}
    for split, numbers in splits.items():
        rows = [
            {
                "query_id": str(number),
                "passage": f"It rained {number} days.",
                "question": f"How long? ({number})",
                "answer": {"number": f"{number}.5", "date": NO_DATE, "spans": []},
                "validated_answers": {"number": [""], "date": [NO_DATE], "spans": [["a", "few days"]]},
            }
            for number in numbers
        ]
        write_lines(folder / f"drop_{split}.jsonl", rows)
    files = {split: str(folder / f"drop_{split}.jsonl") for split in splits}
    kwargs = {"data_files": files, "cache_dir": str(folder / ".cache")}
    task = {"include": str(task_files / "minima_drop.yaml"), "task": "hub_drop", "dataset_path": "json"}
    (folder / "hub_drop.yaml").write_text(yaml.safe_dump(task | {"dataset_kwargs": kwargs}))


def write_data(folder: Path) -> None:
    """One or two items of each benchmark, in the form that tools/fetch_benchmarks.py writes."""
    mmlu = [{"question": "?", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 1}]
    for split in ("dev", "test"):
        write_lines(folder / "mmlu" / "anatomy" / f"{split}.jsonl", mmlu * 5)
    drop = {"query_id": "1", "passage": "It rained.", "question": "What?", "answers": [["rain", "water"], ["it"]]}
    write_lines(folder / "drop" / "test.jsonl", [drop])
    write_lines(folder / "drop" / "shots.jsonl", [drop | {"question": f"{index}?"} for index in range(3)])
    write_lines(folder / "gsm8k" / "test.jsonl", [{"question": "1 + 1?", "answer": "2\n#### 2"}])
    program = {"task_id": "0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f):\n    assert f() == 1"}
    write_lines(folder / "humaneval" / "test.jsonl", [program])


def recipe(folder: Path, **stage) -> Recipe:
    return Recipe(name="test", stages=[{"name": "scores", "kind": "benchmark", "model": str(folder / "model")} | stage])


def context(folder: Path, made: Recipe, allow: bool) -> StageContext:
    own = folder / "run" / "scores"
    own.mkdir(parents=True, exist_ok=True)
    return StageContext(made, folder / "r.yaml", made.stages[0], own, folder / "run", Launch(), allow)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The stage's folder and metrics after its one start of lm-eval."""
    folder = tmp_path_factory.mktemp("benchmark")
    write_model(folder / "model")
    write_tasks(folder / "tasks")
    write_hub_drop(folder / "tasks", folder / "run" / "scores" / "task_files")
    write_data(folder / "data")
    asked = recipe(
        folder, tasks=TASKS, task_folder=str(folder / "tasks"), data_folder=str(folder / "data"), num_fewshot=SHOTS
    )
    metrics = benchmark.run(context(folder, asked, allow=True))
    return folder, metrics


def direct(folder: Path) -> tuple[list[list[float]], list[int]]:
    """Log-likelihood of every choice after the shots, and the right ones, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    shots = "".join(f"{row['question']}? {row['choices'][row['answer']]}\n\n" for row in items(4, 2)[:SHOTS])
    scores = []
    for row in items(20, 1):
        own = []
        for choice in row["choices"]:
            before = tokenizer(shots + row["question"] + "?")["input_ids"]
            after = tokenizer(" " + choice)["input_ids"]
            ids_BT = torch.tensor([before + after])
            with torch.no_grad():
                log_probs_TV = model(ids_BT).logits[0].float().log_softmax(-1)
            own.append(sum(log_probs_TV[len(before) + i - 1, token].item() for i, token in enumerate(after)))
        scores.append(own)
    return scores, [row["answer"] for row in items(20, 1)]


def test_the_harness_gives_the_numbers_of_a_direct_computation(run):
    folder, metrics = run
    scores, right = direct(folder)
    samples = (folder / "run" / "scores" / "lm_eval" / "tasks" / "samples_choice.jsonl").read_text().splitlines()
    found = sorted(map(json.loads, samples), key=lambda sample: sample["doc_id"])
    theirs = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in found]
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(scores), rtol=1e-4, atol=1e-3)
    chosen = [max(range(4), key=own.__getitem__) for own in scores]
    assert [max(range(4), key=own.__getitem__) for own in theirs] == chosen
    assert len(set(chosen)) > 1  # a model that always takes the same one would show little
    accuracy = sum(one == other for one, other in zip(chosen, right, strict=True)) / 20
    assert metrics["choice"]["score"] == pytest.approx(accuracy)


def test_what_is_stored_with_a_number(run):
    folder, metrics = run
    assert metrics["choice"] == metrics["choice"] | {
        "metric": "acc", "filter": "none", "shots": SHOTS, "items": 20, "version": 7.0, "limited": False,
        "stand_in": False,
    }  # fmt: skip
    stored = json.loads((folder / "run" / "scores" / "benchmark.json").read_text())
    assert stored["harness"]["name"] == "lm-eval" and stored["harness"]["version"].startswith("0.")
    assert (stored["window"], stored["limit"], stored["chat"]) == (4096, None, False)
    assert set(stored["tasks"]) == set(TASKS)
    assert all(len(digest) == 64 for task in stored["tasks"].values() for digest in task["hashes"].values())


def test_every_local_task_of_the_suite_runs(run):
    _, metrics = run
    counts = {name: metrics[name]["items"] for name in TASKS}
    assert counts == {
        "choice": 20, "hub_drop": 2, "minima_continuation": 64, "local_mmlu": 5, "stand_in_ceval": 8, "local_drop": 1,
        "stand_in_bbh": 15, "local_gsm8k": 1, "local_humaneval": 1,
    }  # fmt: skip
    assert metrics["local_humaneval"]["shots"] == 0 and metrics["local_humaneval"]["score"] == 0.0
    assert [name for name in TASKS if metrics[name]["stand_in"]] == ["stand_in_ceval", "stand_in_bbh"]


def test_prompts_of_the_local_tasks(run):
    folder, _ = run

    def prompt(task: str) -> str:
        path = folder / "run" / "scores" / "lm_eval" / "tasks" / f"samples_{task}.jsonl"
        return json.loads(path.read_text().splitlines()[0])["arguments"]["gen_args_0"]["arg_0"]

    shot = "It rained. 0?\nAnswer: rain, water\n\nIt rained. 1?\nAnswer: rain, water\n\n"
    assert prompt("local_drop") == shot + "It rained. What?\nAnswer:"
    assert prompt("local_mmlu_anatomy").startswith("The following are multiple choice questions (with answers) about")
    assert prompt("stand_in_ceval").startswith("以下是中国关于常识的单项选择题")
    worked = prompt("local_gsm8k").split("\n\n")
    assert len(worked) == SHOTS + 1 and "The answer is 6." in worked[0] and worked[-1] == "Q: 1 + 1?\nA:"
    assert prompt("stand_in_bbh_navigate").count("Q: If you follow these instructions") == SHOTS + 1
    assert prompt("local_humaneval") == "def f():\n"


def test_drop_from_the_hub_shows_answers_and_accepts_each_of_them(run):
    folder, _ = run
    path = folder / "run" / "scores" / "lm_eval" / "tasks" / "samples_hub_drop.jsonl"
    sample = json.loads(path.read_text().splitlines()[0])
    shots = sample["arguments"]["gen_args_0"]["arg_0"].split("\n\n")
    assert len(shots) == SHOTS + 1 and shots[-1] == "It rained 4 days. How long? (4)\nAnswer:"
    for shot in shots[:-1]:
        number = shot.removeprefix("It rained ")[0]
        assert shot == f"It rained {number} days. How long? ({number})\nAnswer: {number}.5"
    assert sample["doc"]["answers"] == [["4.5"], ["a", "few days"]]


def test_a_second_start_asks_nothing_and_answers_go_on(run):
    folder, metrics = run
    question = {"question_id": 1, "category": "math", "turns": ["What does the cat see?", "Why?"]}
    write_lines(folder / "q.jsonl", [question])
    asked = recipe(
        folder,
        tasks=TASKS,
        task_folder=str(folder / "tasks"),
        data_folder=str(folder / "data"),
        num_fewshot=SHOTS,
        answers=[{"format": "mt_bench", "questions": str(folder / "q.jsonl"), "max_new_tokens": 6}],
    )
    again = benchmark.run(context(folder, asked, allow=True))
    assert again["answers"]["mt_bench"] | {"file": ""} == {"questions": 1, "resumed": 0, "unanswered": 0, "file": ""}
    assert {name: again[name] for name in TASKS} == metrics
    row = json.loads((folder / "run" / "scores" / "answers" / "mt_bench.jsonl").read_text())
    assert row["question_id"] == 1 and len(row["choices"][0]["turns"]) == 2


def test_refusals_before_anything_starts(run, tmp_path):
    folder, _ = run
    (tmp_path / "model").mkdir()
    base = {"tasks": ["choice"]}
    with pytest.raises(StageError, match="not an exported model"):
        benchmark.run(context(tmp_path, recipe(tmp_path, **base), allow=False))
    with pytest.raises(StageError, match="--allow-code-execution"):
        benchmark.run(context(folder, recipe(folder, tasks=["humaneval"]), allow=False))
    with pytest.raises(StageError, match="data_folder '/nowhere' is no folder"):
        benchmark.run(context(folder, recipe(folder, suite="minima", data_folder="/nowhere"), allow=False))
    twice = [{"format": "mt_bench", "questions": "a"}] * 2
    with pytest.raises(StageError, match="overwrite"):
        benchmark.run(context(folder, recipe(folder, answers=twice), allow=False))
    plain = tmp_path / "plain" / "model"
    write_model(plain)
    for path in plain.glob("chat_template*"):
        path.unlink()
    with pytest.raises(StageError, match="no chat template"):
        benchmark.run(context(plain.parent, recipe(plain.parent, chat=True, **base), allow=False))

"""lm-eval itself on a small model, checked against transformers: one run of the stage, which all tests here share.

Its call of the further tasks is a real start; those of the suite are forks of one more (see `tests/lm_eval_server.py`).
"""

import json
import re
from operator import itemgetter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")

from minima.errors import StageError
from minima.evaluation import harness
from minima.launcher import Launch
from minima.recipe.schema import Recipe
from minima.stages import benchmark
from minima.stages.context import StageContext
from tests.lm_eval_starts import LmEvalServer
from tests.small_benchmarks import items, write_data, write_hub_drop, write_lines, write_model, write_tasks

SHOTS = 2  # of the further tasks
TASKS = ["choice", "hub_drop", "minima_continuation"]
SUITE = {  # shots, items and tasks of each benchmark
    "mmlu": (5, 10, ["local_mmlu_anatomy", "local_mmlu_astronomy"]),
    "ceval_stand_in": (5, 8, ["stand_in_ceval"]),
    "drop": (3, 5, ["local_drop"]),
    "humaneval": (0, 5, ["local_humaneval"]),
    "bbh_stand_in": (3, 15, [f"stand_in_bbh_{it}" for it in ("boolean_expressions", "navigate", "object_counting")]),
    "gsm8k": (8, 5, ["local_gsm8k"]),
}
MARKS = {  # what stands once in the prompt for each example, and once for the item itself
    "mmlu": "\nAnswer:", "ceval_stand_in": "\n答案：", "drop": "\nAnswer:", "bbh_stand_in": "Q: ", "gsm8k": "Q: ",
}  # fmt: skip


def recipe(folder: Path, **stage) -> Recipe:
    return Recipe(name="test", stages=[{"name": "scores", "kind": "benchmark", "model": str(folder / "model")} | stage])


def context(folder: Path, made: Recipe, allow: bool) -> StageContext:
    own = folder / "run" / "scores"
    own.mkdir(parents=True, exist_ok=True)
    return StageContext(made, folder / "r.yaml", made.stages[0], own, folder / "run", Launch(), allow)


def whole(folder: Path, **keys) -> Recipe:
    """The suite and further tasks in one stage."""
    return recipe(
        folder, suite="minima", tasks=TASKS, task_folder=str(folder / "tasks"), data_folder=str(folder / "data"),
        num_fewshot=SHOTS, **keys,
    )  # fmt: skip


def results(folder: Path, call: str) -> dict:
    """What lm-eval itself wrote of a call."""
    return json.loads((folder / "run" / "scores" / "lm_eval" / call / "results.json").read_text())


def samples(folder: Path, call: str, task: str) -> list[dict]:
    """Each item of a task as lm-eval wrote it, in order; once, where several filters have read its answer."""
    path = folder / "run" / "scores" / "lm_eval" / call / f"samples_{task}.jsonl"
    by_item = {sample["doc_id"]: sample for sample in map(json.loads, path.read_text().splitlines())}
    return [by_item[number] for number in sorted(by_item)]


def prompt(sample: dict) -> str:
    return sample["arguments"]["gen_args_0"]["arg_0"]


@pytest.fixture(scope="module")
def server():
    """Starts of lm-eval that are forks; it gets ready while others work."""
    with LmEvalServer() as ready:
        yield ready


@pytest.fixture(scope="module")
def run(tmp_path_factory, server):
    """The stage's folder and metrics."""
    folder = tmp_path_factory.mktemp("benchmark")
    write_model(folder / "model")
    write_tasks(folder / "tasks")
    write_hub_drop(folder / "tasks", folder / "run" / "scores" / "task_files")
    write_data(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "_tee", server.instead_of(harness._tee, but="tasks"))
        metrics = benchmark.run(context(folder, whole(folder), allow=True))
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
    found = samples(folder, "tasks", "choice")
    theirs = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in found]
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(scores), rtol=1e-4, atol=1e-3)
    chosen = [max(range(4), key=own.__getitem__) for own in scores]
    assert [max(range(4), key=own.__getitem__) for own in theirs] == chosen
    assert len(set(chosen)) > 1  # a model that always takes the same one would show little
    accuracy = sum(one == other for one, other in zip(chosen, right, strict=True)) / 20
    assert metrics["choice"]["score"] == pytest.approx(accuracy)


def test_several_processes_share_the_items(run, tmp_path, monkeypatch):
    """accelerate really starts two; only their devices are pretended, CPUs in place of GPUs."""
    folder, _ = run
    (tmp_path / "sitecustomize.py").write_text(
        "import os, torch\n"
        "torch.cuda.device_count = lambda: 2\n"
        "if 'LOCAL_RANK' in os.environ:\n"
        "    os.environ['ACCELERATE_USE_CPU'] = '1'\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(harness, "num_accelerators", lambda: 2)
    settings = harness.Settings(folder / "model", limit=7, task_folders=(folder / "tasks",))  # 4 and 3 items
    found = harness.ask(harness.Call("shared", ("choice",), SHOTS), settings, tmp_path)
    assert "on rank 1..." in (tmp_path / "shared" / "lm_eval.log").read_text()
    together = sorted(map(json.loads, (tmp_path / "shared" / "samples_choice.jsonl").open()), key=itemgetter("doc_id"))
    alone = samples(folder, "tasks", "choice")[:7]
    for one, other in zip(together, alone, strict=True):
        assert one["doc_hash"] == other["doc_hash"] and one["acc"] == other["acc"]
        scores = [torch.tensor([float(score) for score, _ in sample["filtered_resps"]]) for sample in (one, other)]
        torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-3)
    assert found["results"]["choice"]["acc,none"] == pytest.approx(sum(sample["acc"] for sample in alone) / 7)


def test_what_is_stored_with_a_number(run):
    folder, metrics = run
    assert metrics["choice"] == metrics["choice"] | {
        "metric": "acc", "filter": "none", "shots": SHOTS, "items": 20, "version": 7.0, "limited": False,
        "stand_in": False,
    }  # fmt: skip
    stored = json.loads((folder / "run" / "scores" / "benchmark.json").read_text())
    assert stored["harness"]["name"] == "lm-eval" and stored["harness"]["version"].startswith("0.")
    assert (stored["window"], stored["limit"], stored["chat"]) == (4096, None, False)
    assert list(stored["tasks"]) == [*SUITE, *TASKS]
    assert all(len(digest) == 64 for task in stored["tasks"].values() for digest in task["hashes"].values())


def test_shots_and_items_of_the_suite_as_lm_eval_recorded_them(run):
    folder, metrics = run
    for name, (shots, count, tasks) in SUITE.items():
        recorded = results(folder, name)
        assert set(tasks) <= set(recorded["n-samples"])
        assert {recorded["n-shot"][task] for task in tasks} == {shots}, name
        asked = [sample for task in tasks for sample in samples(folder, name, task)]
        assert len({sample["doc_hash"] for sample in asked}) == len(asked) == count, name
        assert sum(recorded["n-samples"][task]["effective"] for task in tasks) == count
        assert (metrics[name]["shots"], metrics[name]["items"]) == (shots, count)
        assert name not in MARKS or {prompt(sample).count(MARKS[name]) for sample in asked} == {shots + 1}, name
    assert metrics.keys() == {*SUITE, *TASKS}
    assert [metrics[name]["items"] for name in TASKS] == [20, 2, 64]
    assert [name for name in metrics if metrics[name]["stand_in"]] == ["ceval_stand_in", "bbh_stand_in"]


def test_a_program_that_passes_is_counted(run):
    folder, metrics = run
    passed = [sample["pass_at_1"] for sample in samples(folder, "humaneval", "local_humaneval")]
    assert passed == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert metrics["humaneval"]["score"] == pytest.approx(0.6)


def test_prompts_of_the_local_tasks(run):
    folder, _ = run

    def first(call: str, task: str) -> str:
        return prompt(samples(folder, call, task)[0])

    examples = "".join(f"It rained. {number}?\nAnswer: rain, water\n\n" for number in range(3))
    assert first("drop", "local_drop") == examples + "It rained. What?\nAnswer:"
    mmlu = first("mmlu", "local_mmlu_anatomy")
    assert mmlu.startswith("The following are multiple choice questions (with answers) about anatomy")
    assert re.findall(r"(?m)^(\d)\. ", mmlu) == ["5", "6", "7", "8", "9", "0"]
    assert first("ceval_stand_in", "stand_in_ceval").startswith("以下是中国关于常识的单项选择题")
    worked = first("gsm8k", "local_gsm8k").split("\n\n")
    assert len(worked) == 9 and "The answer is 6." in worked[0] and worked[-1] == "Q: 1 + 1?\nA:"
    assert first("bbh_stand_in", "stand_in_bbh_navigate").count("Q: If you follow these instructions") == 4
    assert first("humaneval", "local_humaneval") == "def f0():\n"


def test_drop_from_the_hub_shows_answers_and_accepts_each_of_them(run):
    folder, _ = run
    sample = samples(folder, "tasks", "hub_drop")[0]
    shots = prompt(sample).split("\n\n")
    assert len(shots) == SHOTS + 1 and shots[-1] == "It rained 4 days. How long? (4)\nAnswer:"
    for shot in shots[:-1]:
        number = shot.removeprefix("It rained ")[0]
        assert shot == f"It rained {number} days. How long? ({number})\nAnswer: {number}.5"
    assert sample["doc"]["answers"] == [["4.5"], ["a", "few days"]]


def test_a_second_start_asks_nothing_and_answers_go_on(run, monkeypatch):
    folder, metrics = run
    question = {"question_id": 1, "category": "math", "turns": ["What does the cat see?", "Why?"]}
    write_lines(folder / "q.jsonl", [question])
    answers = {"format": "mt_bench", "questions": str(folder / "q.jsonl"), "max_new_tokens": 6}

    def started(*_):
        raise AssertionError("lm-eval was started again")

    monkeypatch.setattr(harness, "_tee", started)
    again = benchmark.run(context(folder, whole(folder, answers=[answers]), allow=True))
    assert again["answers"]["mt_bench"] | {"file": ""} == {"questions": 1, "resumed": 0, "unanswered": 0, "file": ""}
    assert {name: again[name] for name in metrics} == metrics
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
    with pytest.raises(StageError, match="data_folder '/nowhere' is not a folder"):
        benchmark.run(context(folder, recipe(folder, suite="minima", data_folder="/nowhere"), allow=False))
    plain = tmp_path / "plain" / "model"
    write_model(plain)
    for path in plain.glob("chat_template*"):
        path.unlink()
    with pytest.raises(StageError, match="no chat template"):
        benchmark.run(context(plain.parent, recipe(plain.parent, chat=True, **base), allow=False))
    config = plain / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "qwen2"}))
    with pytest.raises(StageError, match="AutoTokenizer loads its tokenizer as Qwen2Tokenizer"):
        benchmark.run(context(plain.parent, recipe(plain.parent, **base), allow=False))

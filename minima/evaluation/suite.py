"""The paper's benchmark suite as lm-eval tasks, with the paper's own numbers, which come from other harnesses.

The tasks are lm-eval's own except where a comment in `minima/assets/tasks` says why not. On the Hub, BBH uses three
examples and no chain of thought, because the paper's harness does (lm-eval's `bbh` has one), and GSM8K uses lm-eval's
eight worked examples, for the same reason.
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from minima.disk import file_sha256
from minima.errors import StageError
from minima.evaluation.harness import Call, check_code_execution, lm_eval_folder
from minima.report.tables import text_table


@dataclass(frozen=True)
class Entry:
    """One benchmark of the suite."""

    name: str  # in the results
    hub: str  # the task that reads from the Hub
    local: str  # the task that reads from this machine
    shots: int  # few-shot examples per item
    metric: str  # of lm-eval's result, with its filter; the one to compare with the paper's number
    paper: tuple[float, float]  # percent, for `PAPER_MODELS` (README of GeneZC/MiniMA)
    paper_harness: str  # the harness that gave these numbers
    local_metric: str | None = None  # the local task's metric, if it has a different name
    files: tuple[str, ...] = ()  # what the local task reads, relative to the data folder
    full: int = 0  # number of items in the whole benchmark; if a data folder holds fewer, its score is marked
    # the local items are hand-made because the real ones are not available, so the score is not one of the benchmark
    stand_in: bool = False
    executes: bool = False  # whether the task executes what the model wrote


PAPER_MODELS = ("MiniMA-3B", "MiniChat-3B")
SUITE = (
    Entry("mmlu", "mmlu", "local_mmlu", 5, "acc,none", (28.51, 38.40), "hendrycks/test", None, ("mmlu",), 14_042),
    Entry("ceval", "ceval-valid", "stand_in_ceval", 5, "acc,none", (28.23, 36.48), "hkust-nlp/ceval", stand_in=True),
    Entry(
        "drop", "minima_drop", "local_drop", 3, "em,none", (22.50, 22.58), "declare-lab/instruct-eval",
        None, ("drop/test.jsonl", "drop/shots.jsonl"), 9_536,
    ),
    Entry(
        "humaneval", "humaneval", "local_humaneval", 0, "pass@1,create_test", (10.98, 18.29),
        "declare-lab/instruct-eval", "pass_at_1,create_test", ("humaneval/test.jsonl",), 164, executes=True,
    ),
    Entry(
        "bbh", "minima_bbh", "stand_in_bbh", 3, "exact_match,none", (31.61, 31.36), "declare-lab/instruct-eval",
        stand_in=True,
    ),
    Entry(
        "gsm8k", "gsm8k_cot", "local_gsm8k", 8, "exact_match,flexible-extract", (8.11, 29.72),
        "Guangxuan-Xiao/GSM8K-eval", None, ("gsm8k/test.jsonl",), 1_319,
    ),
)  # fmt: skip
FETCH = "tools/fetch_benchmarks.py"


@dataclass(frozen=True)
class Asked:
    """One line of the results: a task, its name here, and its entry in the suite, if any."""

    name: str  # in the stage's metrics
    task: str  # lm-eval's name
    call: Call  # the lm-eval run that includes it
    metric: str | None = None  # to show; the task's first one if not given
    entry: Entry | None = None  # of the suite, if the task belongs to it
    stand_in: bool = False  # whether hand-made items replace those of the benchmark


def plan_suite(data_folder: Path | None, allow_code_execution: bool) -> tuple[list[Asked], list[str]]:
    """The tasks of `suite: minima`, and the names of those left out because they execute the model's programs.

    Args:
        data_folder: holds the items; the Hub is used if not given.

    Raises:
        StageError: a file is missing from the data folder.
    """
    asked, left_out = [], []
    for entry in SUITE:
        if entry.executes and not allow_code_execution:
            left_out.append(entry.name)
            continue
        local = data_folder is not None
        if data_folder is not None:
            _check_files(entry, data_folder)
        stand_in = local and entry.stand_in
        name = f"{entry.name}_stand_in" if stand_in else entry.name  # so that the two cannot be confused
        task = entry.local if local else entry.hub
        metric = entry.local_metric if local and entry.local_metric else entry.metric
        asked.append(Asked(name, task, Call(name, (task,), entry.shots), metric, entry, stand_in))
    return asked, left_out


def plan_tasks(tasks: Sequence[str], shots: int | None, allow_code_execution: bool) -> list[Asked]:
    """Further tasks, all in one call.

    Raises:
        StageError: one of them is known to execute what the model wrote, and that is not allowed.
    """
    check_code_execution(tasks, allow_code_execution)
    call = Call("tasks", tuple(tasks), shots)
    return [Asked(task, task, call, stand_in=task.startswith("stand_in_")) for task in call.tasks]


def _check_files(entry: Entry, folder: Path) -> None:
    if missing := [name for name in entry.files if not (folder / name).exists()]:
        raise StageError(
            f"data_folder {folder} has no {', '.join(missing)}",
            f"the items of {entry.name} are read from there",
            f"create it with `python {FETCH}`, or omit data_folder to read from the Hub",
        )


def write_tasks(folder: Path, data_folder: Path | None) -> Path:
    """Write the task files that minima ships, with the paths of this machine filled in.

    Args:
        folder: replaced if it exists.
        data_folder: holds the suite's items; if not given, the tasks that read them are left out.

    Returns:
        `folder`, for lm-eval's `include_path`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    subjects = sorted(path.name for path in (data_folder / "mmlu").glob("*/")) if data_folder else []
    paths = {
        "LM_EVAL": str(lm_eval_folder()),
        "SHIPPED": str(folder.resolve()),
        "CACHE": str((folder / ".cache").resolve()),
        "DATA": str(data_folder.resolve()) if data_folder else "",
        "SUBJECTS": f"[{', '.join(f'local_mmlu_{subject}' for subject in subjects)}]",
    }
    for asset in (resources.files("minima.assets") / "tasks").iterdir():
        if not asset.is_file() or (asset.name.startswith("local_") and data_folder is None):
            continue
        text = asset.read_text(encoding="utf-8")
        filled = {asset.name: text}
        if asset.name == "_local_mmlu_subject":
            filled = {f"local_mmlu_{one}.yaml": Template(text).safe_substitute(paths, SUBJECT=one) for one in subjects}
        elif asset.name.endswith(".yaml") or "." not in asset.name:
            filled = {asset.name: Template(text).safe_substitute(paths)}
        for name, content in filled.items():
            (folder / name).write_text(content, encoding="utf-8")
    return folder


def score(asked: Asked, results: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    """One task's numbers from lm-eval's results, as a flat dict.

    Returns:
        `task`, `version`, `shots`, `items`, `items_in_all`, `metric`, `filter`, `score`, `stderr`, `metrics` (all of
        them), `limited`, `stand_in`, `answer_tokens` (set if answers were shortened to fit the model's window),
        `hashes` (of the prompts of each task in it) and, for the suite, `paper`.

    Raises:
        StageError: lm-eval gave no such number.
    """
    numbers = {**results.get("results", {}), **results.get("groups", {})}.get(asked.task, {})
    values = {key: value for key, value in numbers.items() if "," in key and isinstance(value, int | float)}
    metrics = {key: value for key, value in values.items() if not key.partition(",")[0].endswith("_stderr")}
    shown = asked.metric or next(iter(metrics), "")
    if shown not in metrics:
        raise StageError(
            f"lm-eval gave no {shown or 'number'} for {asked.task} (it gave {', '.join(metrics) or 'nothing'})",
            "there is no score to store",
            "check its results beside benchmark.json; the name may differ in another version of lm-eval",
        )
    metric, _, filter_name = shown.partition(",")
    leaves = _leaves(asked.task, results.get("group_subtasks", {}))
    counts = [results["n-samples"][leaf] for leaf in leaves]
    shots = sorted({results["n-shot"][leaf] for leaf in leaves})
    items, in_all = sum(count["effective"] for count in counts), sum(count["original"] for count in counts)
    if asked.entry is not None and asked.task == asked.entry.local and not asked.stand_in:
        in_all = max(in_all, asked.entry.full)
    found = {
        "task": asked.task,
        "version": results["versions"].get(asked.task),
        "shots": shots[0] if len(shots) == 1 else shots,
        "metric": metric,
        "filter": filter_name,
        "score": metrics[shown],
        "stderr": values.get(f"{metric}_stderr,{filter_name}"),
        "items": items,
        "items_in_all": in_all,
        "limited": items < in_all,
        "limit": limit,
        "stand_in": asked.stand_in,
        "metrics": metrics,
        "answer_tokens": _answer_tokens(results, leaves),
        "hashes": {leaf: results.get("task_hashes", {}).get(leaf) for leaf in leaves},
    }
    if asked.entry is not None:
        paper = dict(zip(PAPER_MODELS, asked.entry.paper, strict=True)) | {"harness": asked.entry.paper_harness}
        found["paper"] = None if asked.stand_in else paper
    return found


def _answer_tokens(results: Mapping[str, Any], leaves: Sequence[str]) -> int | None:
    """The maximum number of tokens of an answer, if we told lm-eval to allow fewer than the task does."""
    written = any(results.get("configs", {}).get(leaf, {}).get("output_type") == "generate_until" for leaf in leaves)
    return ((results.get("config") or {}).get("gen_kwargs") or {}).get("max_gen_toks") if written else None


def _leaves(task: str, members: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks that a group consists of; the task itself if it is not a group."""
    if not members.get(task):
        return [task]
    return [leaf for member in members[task] for leaf in _leaves(member, members)]


def table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of our scores in percent next to the paper's, which come from other harnesses."""
    compared = [found["paper"]["harness"] for found in scores.values() if found.get("paper")]
    rows: list[tuple[Any, ...]] = []
    for name, found in scores.items():
        marks = ["hand-made items: not a benchmark score"] if found["stand_in"] else []
        marks += [f"limited: {found['items']} of {found['items_in_all']} items"] if found["limited"] else []
        marks += [f"answers of at most {found['answer_tokens']} tokens"] if found.get("answer_tokens") else []
        stderr = None if found["stderr"] is None else 100.0 * found["stderr"]
        own = (name, found["shots"], found["metric"], found["items"], 100.0 * found["score"], stderr)
        paper = found.get("paper") or {}
        rows.append((*own, *([paper.get(model) for model in PAPER_MODELS] if compared else []), "; ".join(marks)))
    theirs = [f"{model}*" for model in PAPER_MODELS] if compared else []
    text = text_table(rows, ("task", "shots", "metric", "items", "score %", "stderr", *theirs, "mark"))
    if compared:
        text += f"\n* the paper's, each from ANOTHER harness ({', '.join(dict.fromkeys(compared))}): compare with care"
    return text


def file_hashes(paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of every file by its path; for a folder, of all `.jsonl` files below it."""
    found = {}
    for path in paths:
        for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]:
            found[str(file)] = file_sha256(file)
    return found

"""The benchmark stage: lm-eval on a model's folder, and answer files for external judges."""

import logging
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

from minima.data.tokenizer import misread_as
from minima.disk import write_json
from minima.errors import StageError
from minima.evaluation.harness import Settings, ask, lm_eval_folder
from minima.evaluation.judged import read_questions, write_answers
from minima.evaluation.suite import SUITE, Asked, file_hashes, plan_suite, plan_tasks, score, table, write_tasks
from minima.models.checksums import WEIGHTS, verify_files
from minima.models.layout import VOCABULARY_FILES, has_chat_template, model_folder
from minima.recipe.release import Benchmark
from minima.report.progress import Progress
from minima.stages.context import StageContext

ANSWER_FILES = {"mt_bench": "mt_bench.jsonl", "mt_bench_zh": "mt_bench_zh.jsonl", "alpaca_eval": "alpaca_eval.json"}
_FLAT = ("score", "metric", "filter", "shots", "items", "stderr", "version", "limited", "stand_in")
logger = logging.getLogger(__name__)


def run(context: StageContext) -> dict[str, Any]:
    """Run the benchmarks, then store and show the scores. Results of an interrupted earlier start are reused.

    Writes `benchmark.json`, lm-eval's own results, samples and logs under `lm_eval/`, the task files with this
    machine's paths under `task_files/`, and `answers/`.

    Returns:
        For each task `score` (a fraction), `metric`, `filter`, `shots`, `items`, `stderr`, `version`, `limited` and
        `stand_in`; also `left_out` and `answers` if there are any.

    Raises:
        StageError: the model, the items or lm-eval are missing, lm-eval failed, or a task would execute code that the
            model wrote, without permission to do so.
        DataError: the questions do not match their declared format.
    """
    stage = context.stage
    assert isinstance(stage, Benchmark)
    folder = context.model(stage.model).folder
    verify_files(folder, WEIGHTS)
    model = check_model(model_folder(folder), stage)
    data = None if stage.data_folder is None else existing(stage.data_folder, "data_folder")
    asked, left_out = plan_suite(data, context.allow_code_execution) if stage.suite else ([], [])
    if stage.tasks:
        asked += plan_tasks(stage.tasks, stage.num_fewshot, context.allow_code_execution)
    # Read before the first model is loaded, so that a mistake in any of them is reported at once.
    questions = [read_questions(Path(answers.questions).expanduser(), answers) for answers in stage.answers]
    progress = Progress(stage.name, sum(map(len, questions)))
    if left_out:
        logger.warning(
            "%s is left out because it executes code that the model wrote. To include it, remove %s and give "
            "`minima run` the flag --allow-code-execution, preferably in a container",
            ", ".join(left_out),
            context.folder,
        )
    metrics: dict[str, Any] = {}
    if asked:
        metrics = _scores(context, stage, model, asked, data)
        progress.note(f"{stage.model}, by lm-eval {metadata.version('lm_eval')}\n{table(metrics)}")
    answered = _answers(context, stage, model, questions, progress) if questions else {}
    shown = {name: {key: value for key, value in found.items() if key in _FLAT} for name, found in metrics.items()}
    return shown | ({"left_out": left_out} if left_out else {}) | ({"answers": answered} if answered else {})


def check_model(folder: Path, stage: Benchmark) -> Path:
    """Return the folder if plain transformers can load it and it has a chat template where the stage needs one.

    Raises:
        StageError: it does not.
    """
    has_tokenizer = any((folder / name).is_file() for name in VOCABULARY_FILES)
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    if not (folder / "config.json").is_file() or not has_tokenizer or not weights:
        raise StageError(
            f"model {stage.model!r}: {folder} is not an exported model (config.json, weights and tokenizer together)",
            "lm-eval loads it with plain transformers",
            "name an export stage, or give a folder in Hugging Face's layout",
        )
    if (stage.chat or stage.answers) and not has_chat_template(folder):
        raise StageError(
            f"model {stage.model!r} has no chat template, and {'chat: true' if stage.chat else 'answers'} needs one",
            "a base model continues a text and was not trained to take turns",
            "use the model that an instruct stage trained, or leave that setting out",
        )
    return folder


def existing(text: str, key: str) -> Path:
    """The path of a folder named in the recipe.

    Raises:
        StageError: it does not exist.
    """
    path = Path(text).expanduser()
    if not path.is_dir():
        raise StageError(
            f"{key} {text!r} is not a folder",
            "the benchmark would have nothing to read",
            "fix the path" + (", or make it with `python tools/fetch_benchmarks.py`" if key == "data_folder" else ""),
        )
    return path


def _scores(
    context: StageContext, stage: Benchmark, model: Path, asked: list[Asked], data: Path | None
) -> dict[str, dict[str, Any]]:
    folder = context.folder / "lm_eval"
    lm_eval_folder()
    if (misread := misread_as(model)) is not None:
        raise StageError(
            f"model {stage.model!r}: AutoTokenizer loads its tokenizer as {misread}, contrary to its tokenizer.json",
            "lm-eval loads it this way, and would score the model on tokens that it was not trained on",
            "train a family whose tokenizer class is not fixed (llama, mistral), or use this family's own tokenizer",
        )
    folder.mkdir(exist_ok=True)
    own = [existing(stage.task_folder, "task_folder")] if stage.task_folder else []
    settings = Settings(
        model=model,
        dtype=stage.dtype,
        batch_size=stage.batch_size,
        limit=stage.limit,
        chat=stage.chat,
        seed=stage.seed,
        task_folders=(write_tasks(context.folder / "task_files", data), *own),
        allow_code_execution=context.allow_code_execution,
    )
    results = {each.call.name: ask(each.call, settings, folder) for each in asked}
    scores = {each.name: score(each, results[each.call.name], stage.limit) for each in asked}
    first = next(iter(results.values()))
    files = [data / name for entry in SUITE for name in entry.files if (data / name).exists()] if data else []
    write_json(
        context.folder / "benchmark.json",
        {
            "model": stage.model,
            "harness": {"name": "lm-eval", "version": first.get("lm_eval_version")},
            "transformers": first.get("transformers_version"),
            "dtype": first.get("config", {}).get("model_dtype"),
            "window": first.get("max_length"),
            "chat": stage.chat,
            "chat_template_sha": first.get("chat_template_sha"),
            "seed": stage.seed,
            "limit": stage.limit,
            "tasks": scores,
            "data_sha256": file_hashes(files),
        },
    )
    return scores


def _answers(
    context: StageContext, stage: Benchmark, model: Path, questions: list[list[dict[str, Any]]], progress: Progress
) -> dict[str, Any]:
    folder = context.folder / "answers"
    folder.mkdir(exist_ok=True)
    name, done = f"{context.recipe.name}-{stage.model}".replace("/", "-"), 0
    counts: dict[str, Any] = {}
    load = cache(partial(_generator, model, stage.dtype))
    for answers, rows in zip(stage.answers, questions, strict=True):
        path = folder / ANSWER_FILES[answers.format]

        def report(answered: int, before: int = done, what: str = answers.format) -> None:
            progress.update(before + answered, {"answered": what})

        written = write_answers(answers, rows, load, path, name=name, seed=stage.seed, progress=report)
        counts[answers.format] = written | {"file": str(path)}
        done += len(rows)
    return counts


def _generator(model: Path, dtype: str | None) -> Any:
    from minima.evaluation.generation import Generator

    return Generator.load(model, dtype=dtype)

"""Running lm-eval as a separate program: its configuration, its start, and its results.

It is never imported here. It runs in an environment without our launcher's variables, directly on a single device, and
through its own launcher, accelerate, on several GPUs.
"""

import codecs
import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from minima.errors import StageError
from minima.evaluation.task_names import installed_lm_eval
from minima.launcher import cleaned_environment, free_port, num_accelerators

RESULTS = "results.json"
logger = logging.getLogger("minima.benchmark")
_TAIL_LINES = 12  # lines of the child's log in an error: enough for the end of a traceback and its message
# lm-eval's refusal of a model whose whole window is no longer than the task's longest answer.
_NO_ROOM = re.compile(r"requested max tokens to generate \(\d+\) must be less than .* \((\d+)\)")
_RAISED = re.compile(
    r"(?!.*ChildFailedError)[\w.]*(?:Error|Exception|Interrupt|Exit)\b.*"
)  # raised by one of the processes, not by accelerate
_RANK = re.compile(r"\[rank\d+\]: ?")  # prefix of each line of a traceback from one of several processes
_CODE_TASKS = ("humaneval", "local_humaneval", "mbpp")  # the most common ones; lm-eval itself knows them all


@dataclass(frozen=True)
class Call:
    """One run of lm-eval."""

    name: str  # of the folder for its results
    tasks: tuple[str, ...]  # names of tasks or groups
    shots: int | None = None  # few-shot examples per item; each task's own number if not given


@dataclass(frozen=True)
class Settings:
    """Settings that all calls of a stage share."""

    model: Path  # a folder that plain transformers loads
    dtype: str | None = None  # of the weights; as stored if not given
    batch_size: int = 8  # sequences per forward pass
    limit: int | None = None  # maximum number of items per task
    chat: bool = False  # apply the tokenizer's chat template
    seed: int = 1234  # of the few-shot examples and of sampling
    # of task files; later ones take precedence over earlier ones, and all over lm-eval's own
    task_folders: tuple[Path, ...] = ()
    allow_code_execution: bool = False  # let tasks execute what the model wrote


def lm_eval_folder() -> Path:
    """The folder where lm-eval is installed.

    Raises:
        StageError: lm-eval is not installed.
    """
    folder = installed_lm_eval()
    if folder is None:
        raise StageError(
            "lm-eval is not installed",
            "a benchmark stage gets all its scores from it",
            "pip install lm-eval accelerate",
        )
    return folder


def check_code_execution(tasks: Sequence[str], allowed: bool) -> None:
    """Refuse tasks that execute what a model wrote, unless the person who started the run allowed it.

    Raises:
        StageError: names the tasks and the flag.
    """
    if not allowed and (executing := [task for task in tasks if task.startswith(_CODE_TASKS)]):
        raise _refusal(executing)


def _refusal(tasks: Sequence[str]) -> StageError:
    return StageError(
        f"{', '.join(tasks)} would execute programs that the model wrote",
        "nobody has reviewed them, so whoever starts the run must decide whether this machine may run them",
        "give `minima run` the flag --allow-code-execution, best in a container; or remove the task",
    )


def configuration(call: Call, settings: Settings, output: Path) -> dict[str, Any]:
    """The content of lm-eval's configuration file."""
    return {
        "model": "hf",
        "model_args": {"pretrained": str(settings.model.resolve()), "dtype": settings.dtype or "auto"},
        "tasks": list(call.tasks),
        "num_fewshot": call.shots,
        "batch_size": settings.batch_size,
        "device": "cuda" if num_accelerators() else "cpu",
        "limit": settings.limit,
        "apply_chat_template": settings.chat,
        "seed": [settings.seed] * 4,  # of random, numpy, torch and the examples
        "include_path": [str(folder.resolve()) for folder in settings.task_folders],
        "output_path": str(output.resolve()),
        "log_samples": True,  # without samples lm-eval reports no hashes of the prompts
        "confirm_run_unsafe_code": settings.allow_code_execution,
    }


def command(configuration_file: Path) -> list[str]:
    """The command line of lm-eval, or with several GPUs that of accelerate's launcher with one process per GPU."""
    run = ["-m", "lm_eval", "run", "--config", str(configuration_file)]
    if (gpus := num_accelerators()) <= 1:
        return [sys.executable, *run]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", str(gpus)]
    settled = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]
    return [sys.executable, *launch, *settled, *run]


def ask(call: Call, settings: Settings, folder: Path) -> dict[str, Any]:
    """Run one call, or return its results from an earlier start of the stage.

    Args:
        folder: of all calls; this one's subfolder (results, samples, configuration and log) is written atomically.

    Returns:
        lm-eval's results as it writes them.

    Raises:
        StageError: lm-eval is not installed, or failed; the message includes its error or the end of its log.
    """
    lm_eval_folder()
    final, partial = folder / call.name, folder / f".{call.name}.partial"
    if not (final / RESULTS).is_file():
        shutil.rmtree(final, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _run(call, settings, partial)
        partial.rename(final)
    return json.loads((final / RESULTS).read_text(encoding="utf-8"))


def _run(call: Call, settings: Settings, folder: Path) -> None:
    content, log = configuration(call, settings, folder / "output"), folder / "lm_eval.log"
    code = _start(content, settings, folder / "configuration.yaml", log)
    if code and (window := _NO_ROOM.search(log.read_text(encoding="utf-8", errors="replace"))):
        half = int(window[1]) // 2  # the other half is for the question
        logger.warning("%s: running again with answers of at most %d tokens", call.name, half)
        content["gen_kwargs"] = {"max_gen_toks": half}
        code = _start(content, settings, folder / "configuration.yaml", log)
    # If lm-eval cannot write its results it only warns, so the exit code is not enough.
    written = sorted((folder / "output").rglob("results_*.json"))
    if code or len(written) != 1:
        raise _failure(call, code, log)
    for path in written[0].parent.iterdir():
        path.rename(folder / (RESULTS if path == written[0] else _plain_name(path)))
    shutil.rmtree(folder / "output")


def _start(content: Mapping[str, Any], settings: Settings, asked: Path, log: Path) -> int:
    asked.write_text(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True), encoding="utf-8")
    allowed = {"HF_ALLOW_CODE_EVAL": "1" if settings.allow_code_execution else "0"}  # overrides the shell's value
    return _tee(command(asked.resolve()), cleaned_environment() | allowed, log)


def _plain_name(samples: Path) -> str:
    """`samples_TASK_2026-01-01T00-00-00.0.jsonl` without the timestamp, so that the name is predictable."""
    return samples.stem.rpartition("_")[0] + samples.suffix


def _tee(command_line: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
    """Run a command with its output copied to our standard output and to a file; return its exit code."""
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    child = subprocess.Popen(
        command_line, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert child.stdout is not None
    try:
        with log.open("wb") as file:
            while chunk := child.stdout.read1(65536):  # type: ignore[attr-defined]
                file.write(chunk)
                sys.stdout.write(decode(chunk))
                sys.stdout.flush()
        return child.wait()
    finally:
        if child.poll() is None:  # interrupted
            child.terminate()
            child.wait()


def _failure(call: Call, code: int, log: Path) -> StageError:
    text = log.read_text(encoding="utf-8", errors="replace")
    if "is marked as unsafe" in text:  # lm-eval knows more such tasks than _CODE_TASKS lists
        return _refusal(call.tasks)
    lines = [_RANK.sub("", line.rpartition("\r")[2].rstrip()) for line in text.splitlines()]
    tail = "\n    ".join([line for line in lines if line.strip()][-_TAIL_LINES:])
    raised = next((line for line in reversed(lines) if _RAISED.match(line)), None)
    how = f"ended with exit code {code}" if code else "ended without a result"
    how += f" on {', '.join(call.tasks)}"
    return StageError(
        f"lm-eval {how}: {raised}" if raised else f"lm-eval {how}; the end of its log:\n    {tail}",
        "there is no score for these tasks; finished calls are kept",
        f"fix the reported problem and run the same command again; the full log is {log}",
    )

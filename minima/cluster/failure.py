"""Why a stage failed, from the logs of Slurm, the job script and the rank that failed first. No torch."""

import re
from pathlib import Path

from minima.disk import last_bytes
from minima.errors import ADVICE
from minima.stages.running import ERROR, HEADER

_TAIL_BYTES = 262144
_SHOWN_LINES = 15
_FAILED_TASK = re.compile(r"srun: error: (\S+): tasks? (\d+)[\d,\- ]*: (.*)")
_START = re.compile(r" job \S+: start \d+ on ")
_OWN = re.compile(r" job \S+: (?!start )")
_SLURM_ERROR = re.compile(r"(slurmstepd|srun|slurmd)[^ ]*: error: ")
_ERROR = re.compile(rf"(\[rank \d+\] )?{ERROR}")  # from rank 0, or with its number from another rank
_SAVED = "exit code 143"  # a rank that saved and left after SIGTERM


def failure(run_folder: Path, stage: str, job: str | None) -> list[str]:
    """The lines of the logs that tell a user why a stage failed; empty if there are none.

    Args:
        job: id of its last job; None for a run without jobs.
    """
    logs = run_folder / "logs"
    if job is None:
        text = _tail(logs / f"{stage}.log")
        own = text[max((index for index, line in enumerate(text) if line.startswith(HEADER)), default=0) :]
        return _from_error(own, len(own)) if any(map(_ERROR.match, own)) else []
    parts = [path for path in logs.glob(f"{stage}-{job}_*[0-9].log") if "-rank" not in path.name[len(stage) :]]
    batch_logs = sorted([logs / f"{stage}-{job}.log", *parts], key=lambda path: path.name)
    return next((lines for path in batch_logs if (lines := _failure_lines(path, path.with_suffix("")))), [])


def cell_failure(run_folder: Path, cell: str, task: str) -> list[str]:
    """Like `failure`, for a cell of a grid, whose stages share the log of their job's script.

    Args:
        task: the task of the job array: `JOB_INDEX`.
    """
    ranks = (run_folder / "cells" / cell / "logs").glob(f"*-{task}-rank*.log")
    newest = max(ranks, key=lambda path: path.stat().st_mtime, default=Path(f"-{task}-rank"))  # of the stage that ended
    return _failure_lines(
        run_folder / "logs" / f"cells-{task}.log", newest.with_name(newest.name.rpartition("-rank")[0])
    )


def _failure_lines(batch_log: Path, ranks: Path) -> list[str]:
    """The lines of a job's logs about its failure.

    Args:
        batch_log: the log of its script.
        ranks: the path of its ranks' logs, up to `-rankN.log`.
    """
    batch = _tail(batch_log)
    start = max((index for index, line in enumerate(batch) if _START.search(line)), default=0)
    last_start = batch[start:]
    said = [line for line in last_start if _OWN.search(line)][-2:]
    errors = [line for line in last_start if _SLURM_ERROR.search(line) and not _FAILED_TASK.search(line)][-3:]
    if (match := _first_failed(last_start)) is not None:
        lines = _from_error(_tail(ranks.with_name(f"{ranks.name}-rank{match[2]}.log")))
        return [match[0], *errors, *said, f"the last lines of rank {match[2]}:", *(f"  {each}" for each in lines)]
    for path in sorted(ranks.parent.glob(f"{ranks.name}-rank*.log")):
        tail = _tail(path)
        if any(map(_ERROR.search, tail)):
            return [*errors, *said, f"the last lines of {path.name}:", *(f"  {each}" for each in _from_error(tail))]
    if any("exit code" in line for line in said) or errors:
        return [*errors, *said, *(f"  {line}" for line in last_start[-_SHOWN_LINES:] if line not in said)]
    if last_start and not any(_START.search(line) for line in last_start):  # the job ended in its preamble
        return last_start[-_SHOWN_LINES:]
    return []


def _first_failed(lines: list[str]) -> re.Match[str] | None:
    """The first failure that srun reports; ranks that ended with a save count only if all did."""
    matches = [match for match in map(_FAILED_TASK.search, lines) if match]
    return next((match for match in matches if _SAVED not in match[3]), matches[0] if matches else None)


def _from_error(lines: list[str], searched: int = 4 * _SHOWN_LINES) -> list[str]:
    """The last error that minima printed, if it is among the last `searched` lines; otherwise the last lines."""
    last = lines[-searched:]
    told = [index for index, line in enumerate(last) if _ERROR.match(line)]
    if not told:
        return last[-_SHOWN_LINES:]
    error = last[told[-1] :]
    advice = next((index for index, line in enumerate(error) if line.startswith(ADVICE)), len(error))
    launchers = (index for index, line in enumerate(error) if index > advice and not line.startswith("  "))
    return error[: next(launchers, len(error))][:_SHOWN_LINES]  # launchers repeat the error in more lines


def _tail(path: Path) -> list[str]:
    """The last lines of a log, each as a terminal would show it in the end."""
    text = last_bytes(path, _TAIL_BYTES).decode("utf-8", errors="replace")
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return ["".join(letter for letter in line if letter.isprintable() or letter == "\t") for line in lines if line]

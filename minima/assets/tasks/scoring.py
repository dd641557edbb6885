"""Functions that the task files call. lm-eval loads this file by its path, in its own process."""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

RUNNER = Path(__file__).with_name("run_untrusted.py")
SECONDS = 10.0  # wall-clock limit for one program; the runner's limit on its CPU time is lower


def drop(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Exact match and F1 of an answer, computed by lm-eval's own rules."""
    from lm_eval.tasks.drop.utils import process_results

    return process_results(doc, [results[0].strip()])


def drop_answers(dataset: Any) -> Any:
    """The Hub's records with lists of accepted answers, as lm-eval prepares them."""
    from lm_eval.tasks.drop.utils import process_docs

    return process_docs(dataset)


def programs(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """Each prompt followed by its answer: a complete function."""
    return [[doc["prompt"] + answer for answer in answers] for answers, doc in zip(resps, docs, strict=True)]


def pass_at_1(references: list[str], predictions: list[list[str]]) -> float:
    """1.0 if the first program passes its test, else 0.0."""
    return float(passes(f"{predictions[0][0]}\n{references[0]}\n"))


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Whether a program runs to its end without an error, in its own process and folder and within limits.

    Args:
        program: untrusted Python code.
        seconds: wall-clock limit after which it and all processes it started are killed.
    """
    token = secrets.token_hex(16)  # only the runner prints it, so a program that exits early does not pass
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.py"
        path.write_text(program, encoding="utf-8", errors="replace")
        child = subprocess.Popen(
            [sys.executable, "-I", str(RUNNER), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": folder},
            start_new_session=True,
        )
        try:
            said, _ = child.communicate(token.encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return child.returncode == 0 and said == token.encode()

"""What the task files call. lm-eval loads this file by its path, in its own process."""

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
SECONDS = 10.0  # of one program by the clock; the runner holds its processor time shorter


def drop(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Exact match and F1 of an answer, by lm-eval's own rules."""
    from lm_eval.tasks.drop.utils import process_results

    return process_results(doc, [results[0].strip()])


def drop_answers(dataset: Any) -> Any:
    """The Hub's records with their accepted answers listed, as lm-eval lists them."""
    from lm_eval.tasks.drop.utils import process_docs

    return process_docs(dataset)


def programs(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """Each answer behind its prompt: a function that can be called."""
    return [[doc["prompt"] + answer for answer in answers] for answers, doc in zip(resps, docs, strict=True)]


def pass_at_1(references: list[str], predictions: list[list[str]]) -> float:
    """1.0 when the first program passes its test, else 0.0."""
    return float(passes(f"{predictions[0][0]}\n{references[0]}\n"))


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Whether a program comes to its end without an error, in a process and a folder of its own and within limits.

    Args:
        program: Python, not trusted.
        seconds: by the clock, before it is ended with all that it started.
    """
    token = secrets.token_hex(16)  # the runner alone says it back: a program that ends itself early has not passed
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

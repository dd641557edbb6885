"""lm-eval's own program, each time in a fork of a process that has imported it and listed its tasks.

A start takes twelve seconds, and eleven of them are those two; a test of seven starts would take a minute and a half.
Reads lines of JSON from standard input (`arguments`, `environment`, `log`) and prints the exit code of each.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import lm_eval.models.huggingface
import lm_eval.tasks
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks._index import TaskIndex
from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401  what every start loads

OWN = Path(lm_eval.tasks.__file__).parent
build = TaskIndex.build
listed = build([OWN])


def build_on_listed(paths, **keys):
    """`TaskIndex.build` that has read lm-eval's own tasks already; those of later folders still come before them."""
    first, *others = paths
    assert first == OWN
    return listed | build(others, **keys)


def answer(arguments: list[str], environment: dict[str, str], log: str) -> int:
    """The exit code of one start, which says all it has to say to a file."""
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    TaskIndex.build = staticmethod(build_on_listed)
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            os._exit(answer(**json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

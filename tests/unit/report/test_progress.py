"""The line that a person follows."""

import io
import os
import subprocess
import sys

import pytest

from minima.report.progress import Progress, duration


def test_a_log_gets_plain_lines():
    stream = io.StringIO()
    progress = Progress("student", 100, stream=stream)
    progress.note("resuming after step 20")
    progress.update(50, {"loss": "4.5000"})
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "student: resuming after step 20"
    assert lines[1].startswith("student: step 50/100  loss 4.5000  left ") and "\r" not in stream.getvalue()


def test_a_terminal_gets_one_line_that_is_redrawn_and_fits():
    stream = io.StringIO()
    progress = Progress("student", 4, columns=60, stream=stream)
    for step in (1, 2, 4):
        progress.update(step, {"loss": "4.5000", "tokens/s": "12,345"})
    progress.note("done")
    drawn = stream.getvalue().split("\r")[1:]
    assert len(drawn) == 3 and all(len(line.split("\n")[0]) == 59 for line in drawn)
    assert drawn[2].count("█") == 24 > drawn[0].count("█")
    assert stream.getvalue().endswith("\nstudent: done\n")


RANK = """
import signal, sys
from minima.report.progress import Progress
signal.signal(signal.SIGTERM, lambda *_: sys.stderr.write("saves and ends\\n"))
sys.stdin.readline()
Progress("student", 4).update(1, {})
sys.stderr.write("goes on\\n")
"""


@pytest.mark.parametrize(("terminal", "said"), [(False, "saves and ends\ngoes on\n"), (True, "goes on\n")])
def test_a_rank_whose_reader_has_gone_is_not_torn_from_its_step(terminal, said):
    """A driver that was killed ends its ranks as SIGTERM does; a terminal that goes has a signal of its own for it."""
    ours, theirs = os.openpty() if terminal else os.pipe()
    rank = subprocess.Popen(
        [sys.executable, "-c", RANK], stdin=subprocess.PIPE, stdout=theirs, stderr=subprocess.PIPE, text=True
    )
    os.close(theirs)
    os.close(ours)
    assert rank.communicate("\n", timeout=20)[1] == said and rank.returncode == 0


def test_durations():
    assert [duration(seconds) for seconds in (0, 59.4, 185, 7650, 360_000)] == ["0s", "59s", "3m05s", "2h07m", "4d04h"]

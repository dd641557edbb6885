"""`minima chat` as a program: through a pipe, and in a terminal."""

import io
import os
import pty
import select
import subprocess
import sys
import time

from minima import cli
from tests.chat_model import ANSWER, ANSWERED_ZH, ASKED_ZH, QUESTION


def test_a_pipe_gets_the_answers_alone(chat_folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n/reset\n{ASKED_ZH}\n"))
    assert cli.main(["chat", str(chat_folder), "--temperature", "0"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{ANSWER}\n\n{ANSWERED_ZH}\n\n"
    assert shown.err == "[a new conversation]\n"


def test_settings_are_refused_before_anything_is_answered(chat_folder, monkeypatch, capsys):
    assert cli.main(["chat", str(chat_folder), "--top-p", "2"]) == cli.USER_ERROR
    assert cli.main(["chat", str(chat_folder / "nothing")]) == cli.USER_ERROR
    shown = capsys.readouterr()
    assert "--top-p 2" in shown.err
    assert "no config.json" in shown.err
    assert not shown.out


def test_in_a_terminal(chat_folder):
    """A person asks, sees the answer stream in, and leaves with Ctrl-D."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "minima", "chat", str(chat_folder), "--temperature", "0", "--dtype", "float32"]
    child = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, close_fds=True)
    os.close(slave)
    seen = ""

    def until(text, start=0):
        nonlocal seen
        end = time.monotonic() + 60
        while text not in seen[start:]:
            assert time.monotonic() < end, seen
            if select.select([master], [], [], 1.0)[0]:
                seen += os.read(master, 4096).decode(errors="replace")

    try:
        until("> ")
        os.write(master, f"{ASKED_ZH}\n".encode())
        until(ANSWERED_ZH)
        start = len(seen)
        os.write(master, b"/help\n")
        until("Ctrl-C  end the answer", start)
        os.write(master, b"\x04")
        until("[the end]", start)
        assert child.wait(timeout=30) == 0
    finally:
        child.kill()
        child.wait()
        os.close(master)

"""What becomes of a command whose output nobody reads any more."""

import os
import subprocess
import sys

import pytest

from minima import cli, console
from minima.errors import CheckpointError


def unread(arguments: list[str], root, both: bool = False) -> tuple[int, str]:
    """Exit code and standard error of a command that writes to a pipe whose reader has gone."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "minima", *arguments], cwd=root, env=environment, text=True, stdout=writer,
            stderr=subprocess.STDOUT if both else subprocess.PIPE,
        )  # fmt: skip
    finally:
        os.close(writer)
    return done.returncode, done.stderr or ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["law", "--help"],
        ["plan", "minima-3b", "--gpus", "16", "--gpu", "h100"],
        ["run", "quickstart", "--dry-run"],
        ["law", "study", "law-small", "--dry-run"],
    ],
)
def test_a_command_ends_without_a_word_once_nobody_reads_on(arguments, root):
    assert unread(arguments, root) == (console.UNREAD, "")


def test_a_mistake_that_nobody_reads_ends_it_as_quietly(root):
    assert unread(["plan", "no-such-recipe"], root, both=True)[0] == console.UNREAD


def test_names_in_files_of_others_do_not_command_the_terminal(capsys):
    console.show(CheckpointError("only a\x1b]0;owned\x07.bin", "why\x9b2J", "do"))
    console.write("reads\t\x1b[2Jcorpus\r\nand more")
    said, told = capsys.readouterr()
    assert said == "reads\t[2Jcorpus\nand more\n"
    assert told.startswith("minima: CheckpointError: only a]0;owned.bin\n  why it matters: why2J\n")


def test_a_pipe_that_is_not_the_output_is_an_error_of_our_own(monkeypatch):
    def broken(options):
        raise BrokenPipeError("to a worker")

    monkeypatch.setattr(cli, "_plan", broken)
    with pytest.raises(BrokenPipeError, match="to a worker"):
        cli.main(["plan", "quickstart"])


@pytest.mark.parametrize(("gone", "code"), [(True, console.UNREAD), (False, cli.OWN_ERROR)])
def test_a_rank_without_a_reader_says_nothing_and_another_pipe_has_its_traceback(monkeypatch, capsys, gone, code):
    def broken(*given):
        raise BrokenPipeError("no reader")

    monkeypatch.setattr("minima.stages.running.run_stage_command", broken)
    monkeypatch.setattr(cli, "silenced", lambda: gone)
    assert cli.main(["stage", "quickstart"]) == code
    assert ("Traceback" in capsys.readouterr().err) != gone


@pytest.mark.parametrize(
    ("closed", "said", "told"),
    [(">&-", "", "more"), ("2>&-", "said\nprint\necho\n", ""), ("<&- >&- 2>&-", "", "")],
)
def test_streams_that_are_closed_lead_nowhere(closed, said, told, root, tmp_path):
    """As some start a daemon. A file that is opened later must not be taken for standard output."""
    code = "import os, sys; from minima import console; "
    code += "console.quietly(lambda: console.write('said') or sys.stderr.write('more') and 0); "
    code += "os.write(os.open('later', os.O_WRONLY | os.O_CREAT), b'mine'); "
    code += "print('print', flush=True); os.system('echo echo')"
    done = subprocess.run(["bash", "-c", f'"$0" -c "$1" {closed}', sys.executable, code], cwd=tmp_path, env=os.environ
                          | {"PYTHONPATH": str(root)}, capture_output=True, text=True)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, said, told)
    assert (tmp_path / "later").read_text() == "mine"

"""What a command writes to the person who started it, and what it does once nobody reads that any more. No torch."""

import os
import select
import signal
import sys
from collections.abc import Callable
from typing import TextIO

from minima.errors import MinimaError

UNREAD = 128 + signal.SIGPIPE  # what a shell says of a program that writes to a pipe which nobody reads


def write(text: str) -> None:
    """Show a line, or several, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def write_on(text: str) -> None:
    """The same, for what may not end half done: it goes on where nobody reads any more."""
    try:
        write(text)
    except BrokenPipeError:
        if not silenced():
            raise


def show(error: MinimaError) -> None:
    """Tell a mistake that the user can mend."""
    sys.stdout.flush()
    sys.stderr.write(f"minima: {type(error).__name__}: {error}\n")  # running.ERROR, which the driver looks for
    sys.stderr.flush()


def quietly(command: Callable[[], int]) -> int:
    """Run a command; where its reader has gone, as `| head` does, it ends without a word.

    Args:
        command: gives its exit code.

    Returns:
        The exit code; `UNREAD` where nobody reads on.
    """
    try:
        try:
            code = command()
        except SystemExit:  # argparse, after its help or a mistake
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        if silenced():
            return UNREAD
        raise  # another pipe: an error of our own
    return code


def silenced() -> bool:
    """Whether nobody reads standard output or error any more; what is still to be written there then goes nowhere."""
    gone = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
    for stream in gone:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    return bool(gone)


def _is_unread(stream: TextIO) -> bool:
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # no file of the system's, as in tests
        return False
    ends = select.poll()
    ends.register(number, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in ends.poll(0))

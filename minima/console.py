"""What a command writes to the person who started it, and what that person's signals and leaving do to it. No torch."""

import errno
import os
import queue
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TextIO

from minima.errors import LostRank, MinimaError

_LOOK_SECONDS, _MOMENT_SECONDS = 0.2, 1.0
UNREAD = 128 + signal.SIGPIPE  # what a shell says of a program that writes to a pipe which nobody reads


def write(text: str) -> None:
    """Show a line, or several, at once; to nobody where the terminal has gone."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except OSError as error:
        if error.errno != errno.EIO or not silenced():
            raise


def write_to_end(text: str) -> None:
    """Like `write`, for commands that must not stop half-way: they carry on when the reader of their output is gone."""
    with outliving_readers(lambda: None):
        write(text)


@contextmanager
def outliving_readers(unread: Callable[[], object]) -> Iterator[None]:
    """What is written within raises nothing where nobody reads it any more, nor does what is written later.

    A terminal that has gone ends nothing by itself: its SIGHUP does, unless nohup or disown kept that off.

    Args:
        unread: is called where a pipe has lost its reader, as by `| head` or by the death of a driver.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EPIPE) or not silenced():
            raise
        if error.errno == errno.EPIPE:
            unread()


def stop_signals() -> tuple[int, ...]:
    """What asks a run to save and end: Ctrl-C, SIGTERM, and a terminal that closes, unless nohup ignores that."""
    hung_up = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
    return signal.SIGINT, signal.SIGTERM, *hung_up


@contextmanager
def taking_signals(stop: Callable[[int], object]) -> Iterator[None]:
    """Have `stop` called with the number of each signal that asks for the end.

    A terminal's end can send SIGHUP twice, from the system and from a shell: one after any other signal is ignored.
    """
    came: list[int] = []

    def take(number: int, frame: object) -> None:
        if number != signal.SIGHUP or not came:
            came.append(number)
            stop(number)

    before = {number: signal.signal(number, take) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def pausing(halt: Callable[[], object], go_on: Callable[[], object]) -> Iterator[None]:
    """At a Ctrl-Z have `halt` called, stop, and have `go_on` called once `fg` or `bg` continues this process."""

    def take(number: int, frame: object) -> None:
        halt()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # returns when it is continued; at once where there is no shell to do so
        signal.signal(signal.SIGTSTP, take)
        go_on()

    before = signal.getsignal(signal.SIGTSTP)
    if before != signal.SIG_IGN:
        signal.signal(signal.SIGTSTP, take)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, before)


class Outlet:
    """Standard output, written from a thread: a terminal that stands still (Ctrl-S, `| less`) holds nothing else up.

    Leaving the context waits until all is written; after an error, or once it is left alone, for a moment only.

    Args:
        unread: is called where a pipe has lost its reader; see `outliving_readers`.
    """

    def __init__(self, unread: Callable[[], object]) -> None:
        self._unread = unread
        self._chunks: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._failure: Exception | None = None
        self._left_alone = threading.Event()
        self._thread = threading.Thread(target=self._pass_on, name="outlet", daemon=True)

    def write(self, chunk: bytes) -> None:
        """Have it written after what came before.

        Raises:
            OSError: an earlier chunk could not be written, as to a file on a full disk.
        """
        if self._failure is not None:
            raise self._failure
        self._chunks.put(chunk)

    def leave_alone(self) -> None:
        """Do not wait for the terminal any more."""
        self._left_alone.set()

    def _pass_on(self) -> None:
        try:
            while (chunk := self._chunks.get()) is not None:
                with outliving_readers(self._unread):
                    _write_through(chunk)
        except Exception as error:
            self._failure = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._chunks.put(None)
        if value is not None:
            self.leave_alone()
        while not self._left_alone.is_set() and self._thread.is_alive():
            self._thread.join(_LOOK_SECONDS)
        self._thread.join(_MOMENT_SECONDS)
        if self._failure is not None and value is None:
            raise self._failure


def _write_through(chunk: bytes) -> None:
    """Past Python's buffer, whose lock a thread that never comes back would hold at the process's end."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError):  # no file of the system's, as in tests
        sys.stdout.buffer.write(chunk)
        sys.stdout.flush()
        return
    while chunk:
        try:
            chunk = chunk[os.write(number, chunk) :]
        except BlockingIOError:  # another program has set the terminal so
            select.select([], [number], [])


def show(error: MinimaError) -> None:
    """Tell a mistake that the user can mend."""
    sys.stdout.flush()
    sys.stderr.write(f"minima: {type(error).__name__}: {error}\n")  # running.ERROR, which the driver looks for
    sys.stderr.flush()


def show_own(error: Exception, rank: int) -> None:
    """Tell an error that is no mistake of the user's."""
    own = f"an error of minima's own, not of the recipe:\n{''.join(traceback.format_exception(error))}"
    sys.stderr.write(f"[rank {rank}] {error if isinstance(error, LostRank) else own.rstrip()}\n")


def quietly(command: Callable[[], int]) -> int:
    """Run a command; where its reader has gone, as `| head` does, it ends without a word.

    Args:
        command: gives its exit code.

    Returns:
        The exit code; `UNREAD` where nobody reads on.
    """
    _lead_closed_streams_nowhere()
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


def _lead_closed_streams_nowhere() -> None:
    """A stream that was closed before the start (`>&-`) is None, and the next file to be opened takes its number."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


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

"""A command's terminal: output, signals (Ctrl-C, Ctrl-Z, hang-up), and readers that disappear. No torch."""

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
UNREAD = 128 + signal.SIGPIPE  # a shell's exit code for a program that wrote to a pipe without a reader
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])  # all but tab and line break


def plain(text: str) -> str:
    """The text without control characters, with which a model or a stranger's file could command the terminal."""
    return text.translate(_CONTROLS)


def write(text: str) -> None:
    """Print one or more lines and flush; does nothing if the terminal is gone."""
    try:
        sys.stdout.write(plain(text) + "\n")
        sys.stdout.flush()
    except OSError as error:
        if error.errno != errno.EIO or not silenced():
            raise


def write_to_end(text: str) -> None:
    """Like `write`, for commands that must not stop halfway: they continue even if nobody reads their output."""
    with outliving_readers(lambda: None):
        write(text)


@contextmanager
def outliving_readers(unread: Callable[[], object]) -> Iterator[None]:
    """Make writes to standard output or error succeed, inside the block and after it, even if nobody reads them.

    A terminal that is gone does not end a run by itself: its SIGHUP does, unless nohup or disown prevent that.

    Args:
        unread: called if a pipe has lost its reader, as with `| head` or when a driver dies.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EPIPE) or not silenced():
            raise
        if error.errno == errno.EPIPE:
            unread()


def stop_signals() -> tuple[int, ...]:
    """The signals that ask a run to save and stop: SIGINT, SIGTERM, and SIGHUP unless it is ignored (nohup)."""
    hung_up = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
    return signal.SIGINT, signal.SIGTERM, *hung_up


@contextmanager
def taking_signals(stop: Callable[[int], object]) -> Iterator[None]:
    """Call `stop` with the number of each stop signal that arrives.

    A closing terminal can send SIGHUP twice, from the system and from a shell: a SIGHUP after any signal is ignored.
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
    """On Ctrl-Z, call `halt`, suspend this process, and call `go_on` once `fg` or `bg` continues it."""

    def take(number: int, frame: object) -> None:
        halt()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # returns when continued; at once if no shell could continue it
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
    """Standard output, written from a thread, so that a stalled terminal (Ctrl-S, `| less`) blocks nothing else.

    Leaving the context waits until everything is written; after an error or `leave_alone`, only for a moment.

    Args:
        unread: called if a pipe has lost its reader; see `outliving_readers`.
    """

    def __init__(self, unread: Callable[[], object]) -> None:
        self._unread = unread
        self._chunks: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._failure: Exception | None = None
        self._left_alone = threading.Event()
        self._thread = threading.Thread(target=self._pass_on, name="outlet", daemon=True)

    def write(self, chunk: bytes) -> None:
        """Queue a chunk for writing.

        Raises:
            OSError: an earlier chunk could not be written, for example because a disk is full.
        """
        if self._failure is not None:
            raise self._failure
        self._chunks.put(chunk)

    def leave_alone(self) -> None:
        """Stop waiting for the terminal."""
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
    """Write without Python's buffer: a thread that blocks for ever would hold its lock when the process ends."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError):  # not a real file, as in tests
        sys.stdout.buffer.write(chunk)
        sys.stdout.flush()
        return
    while chunk:
        try:
            chunk = chunk[os.write(number, chunk) :]
        except BlockingIOError:  # another program has made the terminal non-blocking
            select.select([], [number], [])


def show(error: MinimaError) -> None:
    """Print an error that the user can fix."""
    sys.stdout.flush()
    said = plain(str(error))
    sys.stderr.write(f"minima: {type(error).__name__}: {said}\n")  # running.ERROR, which the driver searches for
    sys.stderr.flush()


def show_own(error: Exception, rank: int) -> None:
    """Print an error that is not the user's mistake, with its traceback unless it is a lost rank."""
    own = f"an internal error of minima, not a mistake in the recipe:\n{''.join(traceback.format_exception(error))}"
    sys.stderr.write(f"[rank {rank}] {error if isinstance(error, LostRank) else own.rstrip()}\n")


def quietly(command: Callable[[], int]) -> int:
    """Run a command, ending silently if its reader disappears, as with `| head`.

    Args:
        command: returns its exit code.

    Returns:
        The exit code; `UNREAD` if the reader has gone.
    """
    _lead_closed_streams_nowhere()
    try:
        try:
            code = command()
        except SystemExit:  # argparse, after --help or a usage error
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        if silenced():
            return UNREAD
        raise  # another pipe: a bug of ours
    return code


def _lead_closed_streams_nowhere() -> None:
    """Redirect closed standard streams (`>&-`) to /dev/null, or the next opened file would get their descriptor."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def silenced() -> bool:
    """Whether standard output or error has lost its reader; a stream that has is redirected to /dev/null."""
    gone = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
    for stream in gone:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    return bool(gone)


def _is_unread(stream: TextIO) -> bool:
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # not a real file, as in tests
        return False
    ends = select.poll()
    ends.register(number, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in ends.poll(0))

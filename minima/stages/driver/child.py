"""Runs a launcher as a child process: output goes to the terminal and to a log for each stage, signals to the ranks."""

import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from minima.console import Outlet, pausing, taking_signals
from minima.launcher import DRIVER, is_rank, processes_of, slurm_job
from minima.stages.run_folder import access_named
from minima.stages.running import ERROR, HEADER

# What deepspeed and torchrun print when SIGKILL ended a rank; their exit code alone does not reveal it.
_KILLED = re.compile(rb"exits with return code = -9$|Signal 9 \(SIGKILL\) received")
_STOPPED = re.compile(rb"stopped by signal (\d+): ")  # `errors.Stopped`, as rank 0 prints it
_CRASHED = re.compile(rb"\[rank \d+\] an internal error of minima")  # `console.show_own`
_TOLD = re.compile(rb"(\[rank \d+\] )?" + ERROR.encode() + rb"(.*)")
# Accepts only a stage's name, so that text from a model or a file cannot choose the path of a log.
_STARTED = re.compile(re.escape(HEADER).encode() + rb"([A-Za-z0-9][A-Za-z0-9_.-]*) \(")


class Log:
    """Splits one stream into `FOLDER/STAGE.log` files, at the lines that announce the start of a stage.

    If a progress bar rewrote a line with carriage returns, only its last state is kept.

    Attributes:
        error: the first line of the first error that a rank reported, as launchers print pages of their own after it.
        killed: whether a launcher reported that a rank was killed by SIGKILL.
        crashed: whether a rank reported an internal error.
        stopped: the signal after which rank 0 saved and ended; None otherwise. Launchers have exit codes of their own.
        lacks: why lines are missing from a log, without which the stage runs on; None if none are.
    """

    def __init__(self, folder: Path, stage: str) -> None:
        self._folder, self._rest = folder, b""
        self.error: str | None = None
        self.killed = self.crashed = False
        self.stopped: int | None = None
        self.lacks: str | None = None
        with access_named(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._open(stage)

    def _open(self, stage: str):
        return open(self._folder / f"{stage}.log", "ab", buffering=0)  # a resumed stage appends to its log

    def _change(self, stage: str) -> None:
        with suppress(OSError):
            self._file.close()
        try:
            self._folder.mkdir(exist_ok=True)  # somebody may have removed it
            self._file = self._open(stage)
        except OSError as error:
            self.lacks = self.lacks or str(error)
            self._file = open(os.devnull, "wb", buffering=0)  # noqa: SIM115

    def _put(self, line: bytes) -> None:
        try:
            self._file.write(line)
        except OSError as error:
            self.lacks = self.lacks or str(error)

    def write(self, chunk: bytes) -> None:
        """Process the next bytes of the stream."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for whole in lines:
            line = whole.rstrip(b"\r").rpartition(b"\r")[2]  # what a terminal shows of it in the end
            if started := _STARTED.match(line):
                self._change(started[1].decode())
            if (told := _TOLD.match(line)) and self.error is None:
                self.error = b"".join(filter(None, told.groups())).decode(errors="replace")
            self.crashed |= _CRASHED.match(line) is not None
            if stopped := _STOPPED.match(line):
                self.stopped = int(stopped[1])
            self.killed |= _KILLED.search(line) is not None
            self._put(line + b"\n")
        # A bar may rewrite its line for weeks. A carriage return at the end is kept: it may be half of a line's end.
        drawn = self._rest.rstrip(b"\r")
        self._rest = drawn.rpartition(b"\r")[2] + self._rest[len(drawn) :][:1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        if self._rest:
            self._put(self._rest.rstrip(b"\r") + b"\n")
        with suppress(OSError):
            self._file.close()


def run_child(command: Sequence[str], environment: Mapping[str, str], log: Log, lock: int) -> int:
    """Run a command to its end in its own session, and return its exit code.

    SIGINT and SIGTERM are passed on to the ranks, so that they can save; the exit code is then 128 + the first signal's
    number, also if only a rank received one. A terminal that closes, or a pipe that loses its reader, sends them
    SIGTERM; the log continues to the end. The launcher gets no signal: some kill their ranks half a minute after one,
    whether they have saved or not. Ctrl-Z suspends all the command's processes on this machine. A stalled terminal
    blocks nothing before the command's end.

    Args:
        environment: its whole environment.
        log: receives the same output as the terminal.
        lock: file descriptor of the run's lock, which the command inherits.
    """
    child = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=[lock],
    )
    driver = environment.get(DRIVER)
    received: list[int] = []
    late: list[int] = []  # signals after the command's end, while the terminal still prints its remaining output

    def stop(number: int) -> None:
        if child.returncode is None:
            received.append(number)
            signal_ranks(child.pid, number if number == signal.SIGINT else signal.SIGTERM, driver)
        else:
            late.append(number)
            terminal.leave_alone()

    def unread() -> None:
        if not received:  # a second signal would end the ranks before they have saved
            stop(signal.SIGPIPE)

    terminal = Outlet(unread)

    def pause() -> None:
        if child.returncode is None:
            signal_all(child.pid, signal.SIGSTOP, driver)

    def go_on() -> None:
        if child.returncode is None:
            signal_all(child.pid, signal.SIGCONT, driver)

    with taking_signals(stop), pausing(pause, go_on), terminal:
        try:
            assert child.stdout is not None
            while chunk := os.read(child.stdout.fileno(), 65536):
                log.write(chunk)
                terminal.write(chunk)
            code = child.wait()
            if received:  # a run that was stopped must not wait for its terminal
                terminal.leave_alone()
        except BaseException:
            signal_group(child.pid, signal.SIGTERM)
            raise
    if received or (late and not code):  # a late signal does not hide the command's own failure
        return 128 + (received or late)[0]
    if code and log.stopped and not (log.error or log.crashed):  # a signal to a rank alone: torchrun's code is 1
        return 128 + log.stopped
    return 128 - code if code < 0 else code


def signal_ranks(session: int, number: int, driver: str | None = None) -> None:
    """Send a signal to a launcher's ranks on this machine, or to its session if there are no ranks yet.

    Args:
        session: the id of the session that the launcher was started in.
        number: of the signal.
        driver: the launcher's MINIMA_DRIVER, which identifies ranks in other sessions.
    """
    processes, job = processes_of(session, driver), slurm_job()
    ranks = [process.pid for process in processes if is_rank(process)]
    if not ranks and job is not None and any(process.info["name"] == "srun" for process in processes):
        # srun reacts to a signal by killing its tasks at once; scancel lets them save.
        subprocess.run(["scancel", f"--signal={signal.Signals(number).name.removeprefix('SIG')}", job.job_id])
    elif not ranks:  # a single-process stage, or a launcher that has not started its ranks yet
        signal_group(session, number)
    _signal(ranks, number)


def signal_all(session: int, number: int, driver: str | None = None) -> None:
    """Send a signal to a launcher and all its processes on this machine; arguments as for `signal_ranks`."""
    _signal([process.pid for process in processes_of(session, driver)], number)


def _signal(processes: Sequence[int], number: int) -> None:
    for process in processes:
        try:
            os.kill(process, number)
        except ProcessLookupError:
            continue


def signal_group(group: int, number: int) -> None:
    """Send a signal to every process of a group, if any are left."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return

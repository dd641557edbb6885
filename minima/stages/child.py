"""A launcher as a child process: its output to the terminal and to a log for each stage, signals passed on."""

import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from minima.console import Outlet, pausing, taking_signals
from minima.launcher import DRIVER, is_rank, processes_of, slurm_job
from minima.stages.run_folder import access_named
from minima.stages.running import ERROR, HEADER

# What launchers say of a rank that SIGKILL has ended: deepspeed and torchrun, whose exit code alone would not tell.
_KILLED = re.compile(rb"exits with return code = -9$|Signal 9 \(SIGKILL\) received")
_TOLD = re.compile(rb"(\[rank \d+\] )?" + re.escape(ERROR).encode() + rb"(.*)")
# A stage's name alone: what a model or a file says must not choose where a log goes.
_STARTED = re.compile(re.escape(HEADER).encode() + rb"([A-Za-z0-9][A-Za-z0-9_.-]*) \(")


class Log:
    """Splits one stream into `FOLDER/STAGE.log` files, at the lines that say which stage starts.

    Of a line that a progress bar rewrote with carriage returns, only its last state is kept.

    Attributes:
        error: the first line of what a rank told the user, for launchers that print pages of their own after it.
        killed: whether a launcher told of a rank that the system has killed.
        lacks: why lines are missing in a log; a stage runs on without it.
    """

    def __init__(self, folder: Path, stage: str) -> None:
        self._folder, self._rest = folder, b""
        self.error: str | None = None
        self.killed = False
        self.lacks: str | None = None
        with access_named(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._open(stage)

    def _open(self, stage: str):
        return open(self._folder / f"{stage}.log", "ab", buffering=0)  # a resumed stage goes on in its old log

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
        """Take the next bytes of the stream."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            if started := _STARTED.match(line):
                self._change(started[1].decode())
            if (told := _TOLD.match(line)) and self.error is None:
                self.error = b"".join(filter(None, told.groups())).decode(errors="replace")
            self.killed |= _KILLED.search(line) is not None
            self._put(line.rstrip(b"\r").rpartition(b"\r")[2] + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._rest:
            self._put(self._rest + b"\n")
        with suppress(OSError):
            self._file.close()


def run_child(command: Sequence[str], environment: Mapping[str, str], log: Log, lock: int) -> int:
    """Run a command to its end in a session of its own, and give its exit code.

    SIGINT and SIGTERM are passed on to the ranks, so that they can save; the code is then 128 plus the first one's
    number. A terminal that goes, and a pipe that nobody reads any more, are a SIGTERM to them; the log goes on to the
    end. The launcher between is left alone: some end their ranks half a minute after a signal, saved or not. A Ctrl-Z
    stops whatever of it runs on this machine. A terminal that stands still holds up nothing before the command's end.

    Args:
        command: what to run.
        environment: its whole environment.
        log: gets what the terminal gets.
        lock: descriptor of the run's lock, which the command inherits.
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
    late: list[int] = []  # while the terminal still takes what the command, which has ended, had to say

    def stop(number: int) -> None:
        if child.returncode is None:
            received.append(number)
            signal_ranks(child.pid, number if number == signal.SIGINT else signal.SIGTERM, driver)
        else:
            late.append(number)
            terminal.leave_alone()

    def unread() -> None:
        if not received:  # a second one would end the ranks before they have saved
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
            if received:  # whoever ends a run from elsewhere does not wait for its terminal
                terminal.leave_alone()
        except BaseException:
            signal_group(child.pid, signal.SIGTERM)
            raise
    if received or (late and not code):  # what has failed by itself has failed
        return 128 + (received or late)[0]
    return 128 - code if code < 0 else code


def signal_ranks(session: int, number: int, driver: str | None = None) -> None:
    """Send a signal to the ranks that a launcher has started here; to its session where there is no rank yet.

    Args:
        session: what the launcher was started in.
        number: of the signal.
        driver: what the launcher's environment has as MINIMA_DRIVER, by which ranks in other sessions are known.
    """
    processes, job = processes_of(session, driver), slurm_job()
    ranks = [process.pid for process in processes if is_rank(process)]
    if not ranks and job is not None and any(process.info["name"] == "srun" for process in processes):
        # srun answers a signal by killing its tasks at once; scancel lets them save.
        subprocess.run(["scancel", f"--signal={signal.Signals(number).name.removeprefix('SIG')}", job.job_id])
    elif not ranks:  # a stage of one process, or a launcher that has not come so far
        signal_group(session, number)
    _signal(ranks, number)


def signal_all(session: int, number: int, driver: str | None = None) -> None:
    """Send a signal to all that a launcher has started here, itself included; the arguments are those of the ranks'."""
    _signal([process.pid for process in processes_of(session, driver)], number)


def _signal(processes: Sequence[int], number: int) -> None:
    for process in processes:
        try:
            os.kill(process, number)
        except ProcessLookupError:
            continue


def signal_group(group: int, number: int) -> None:
    """Send a signal to every process of a group, if it still has any."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return

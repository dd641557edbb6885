"""Run a study on this machine's GPUs or cores: worker processes, each given one run after another."""

import logging
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from minima.console import taking_signals
from minima.launcher import child_environment, num_accelerators
from minima.law.study.grid import Unit
from minima.law.study.worker import BEGUN, DONE, EVENT, READY

POLL_SECONDS = 1.0  # between two checks for a signal
_ERROR = "minima: "
logger = logging.getLogger("minima.study")


@dataclass
class Tally:
    """The progress of a study."""

    done: set[str] = field(default_factory=set)  # names of finished runs
    running: set[str] = field(default_factory=set)  # names of runs that a worker is making
    failed: dict[str, str] = field(default_factory=dict)  # why a run failed, by its name
    made: int = 0  # number of runs finished since the driver started
    # time of all workers from their start until their first run could begin (Python, torch, DeepSpeed)
    startup_seconds: float = 0.0
    worker_seconds: float = 0.0  # time of all workers from their start to their end, or until now
    stopped: int = 0  # number of the signal that asked for the end; 0 for none

    def startup_line(self) -> str:
        """A line about the share of the workers' time that went into starting them."""
        share = self.startup_seconds / max(self.worker_seconds, 1e-9)
        return (
            f"starting workers took {self.startup_seconds:.1f} s of their {self.worker_seconds:.1f} s: "
            f"{100 * share:.1f} %, over {self.made} runs"
        )


def ready_units(units: Sequence[Unit], tally: Tally) -> list[Unit]:
    """The runs that can begin because everything they read is finished, cheapest first."""
    taken = tally.done | tally.running | set(tally.failed)
    ready = [unit for unit in units if unit.name not in taken and tally.done.issuperset(unit.needs)]
    return sorted(ready, key=lambda unit: unit.flops)


class _Worker:
    """A worker process, and the thread that reads its output."""

    def __init__(
        self,
        number: int,
        command: Sequence[str],
        environment: dict[str, str],
        lock: int,
        said: "queue.Queue[tuple[_Worker, str]]",
        logs: Path,
    ) -> None:
        self.number, self.began, self.ready = number, time.monotonic(), False
        self.unit: Unit | None = None
        self.told = 0  # how often it was asked to end
        self.error: str | None = None
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            pass_fds=[lock],
        )
        self.log = logs / f"worker-{number}.log"
        threading.Thread(target=self._read, args=(said, logs), daemon=True).start()

    def _read(self, said: "queue.Queue[tuple[_Worker, str]]", logs: Path) -> None:
        assert self.process.stdout is not None
        log = _Log(self.log)
        for line in self.process.stdout:
            words = line.removeprefix(EVENT).split() if line.startswith(EVENT) else []
            if words:
                event = words[0]
                if event == BEGUN:
                    log.close()
                    log = _Log(logs / f"{words[1]}.log")
                    self.error = None
                said.put((self, event))
                continue
            if line.startswith(_ERROR) and self.error is None:
                self.error = line.removeprefix(_ERROR).strip()
            log.write(line)
        self.process.wait()
        log.close()
        said.put((self, "ended"))

    def give(self, unit: Unit) -> None:
        """Give the worker a run to make."""
        assert self.process.stdin is not None
        self.unit = unit
        with suppress(BrokenPipeError, ValueError):  # it has ended, which its reader reports; or a signal has closed it
            self.process.stdin.write(unit.name + "\n")
            self.process.stdin.flush()

    def close(self) -> None:
        """Tell the worker that no more runs will come."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError, RuntimeError):  # it has ended, or a signal came while it was given a run
            self.process.stdin.close()


class Pool:
    """Workers, and the queue that feeds them.

    Args:
        logs: folder of the runs' logs.
        lock: descriptor of the study's lock, which the workers inherit.
        show: called with the tally after each event.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        command: Sequence[str],
        workers: int,
        logs: Path,
        lock: int,
        show: Callable[[Tally], None],
    ) -> None:
        self.units, self.command, self.logs, self.lock, self.show = units, command, logs, lock, show
        self.tally = Tally(done={unit.name for unit in units if unit.is_done()})
        self._said: queue.Queue[tuple[_Worker, str]] = queue.Queue()
        self._wanted, self._workers = workers, dict[int, _Worker]()
        self._ended_seconds, self._asked = 0.0, 0

    def run(self) -> Tally:
        """Make the remaining runs; ends early on a signal, with everything saved."""
        with self._signals():
            self._start()
            while self._workers:
                if self.tally.stopped:
                    self._stop()  # also a worker that was being started when the signal came
                try:
                    worker, event = self._said.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    continue
                self._take(worker, event)
                self._feed()
                self._show()
        return self.tally

    def _start(self) -> None:
        """Start workers if more runs can begin than there are idle workers."""
        waiting = len(ready_units(self.units, self.tally))
        waiting -= len([worker for worker in self._workers.values() if worker.unit is None])
        for number in [number for number in range(self._wanted) if number not in self._workers][: max(0, waiting)]:
            environment = child_environment(self._wanted)
            if num_accelerators():
                visible = environment.get("CUDA_VISIBLE_DEVICES")
                devices = visible.split(",") if visible else [str(index) for index in range(num_accelerators())]
                environment["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)].strip()
            self._workers[number] = _Worker(number, self.command, environment, self.lock, self._said, self.logs)

    def _take(self, worker: _Worker, event: str) -> None:
        tally = self.tally
        if event == READY:
            worker.ready = True
            tally.startup_seconds += time.monotonic() - worker.began
        elif event == DONE and worker.unit is not None:
            tally.running.discard(worker.unit.name)
            tally.done.add(worker.unit.name)
            tally.made += 1
            worker.unit = None
        elif event == "ended":
            del self._workers[worker.number]
            self._ended_seconds += time.monotonic() - worker.began
            if worker.unit is not None:
                tally.running.discard(worker.unit.name)
            if not tally.stopped:
                self._failed(worker)

    def _failed(self, worker: _Worker) -> None:
        code = worker.process.returncode
        if worker.unit is not None:
            reason = worker.error or (f"ended by signal {-code}" if code < 0 else f"exit code {code}")
            self.tally.failed[worker.unit.name] = reason
        elif not worker.ready:  # another one would get no further
            reason = worker.error or f"a worker could not start: exit code {code}, see {worker.log}"
            for unit in self.units:
                if unit.name not in self.tally.done | self.tally.running:
                    self.tally.failed.setdefault(unit.name, reason)

    def _feed(self) -> None:
        if self.tally.stopped:
            return
        self._start()
        ready = ready_units(self.units, self.tally)
        for worker in self._workers.values():
            if worker.ready and worker.unit is None and ready:
                unit = ready.pop(0)
                self.tally.running.add(unit.name)
                worker.give(unit)
        if not self.tally.running and not ready:
            for worker in self._workers.values():
                worker.close()

    def _show(self) -> None:
        now = time.monotonic()
        self.tally.worker_seconds = self._ended_seconds + sum(now - each.began for each in self._workers.values())
        self.show(self.tally)

    def _stop(self) -> None:
        """Ask every worker to end, as often as the driver itself has been asked."""
        for worker in list(self._workers.values()):
            if worker.told < self._asked:
                worker.told = self._asked
                worker.close()
                if worker.process.poll() is None:
                    os.kill(worker.process.pid, self.tally.stopped)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(number: int) -> None:
            self.tally.stopped = self.tally.stopped or number
            self._asked += 1
            self._stop()

        try:
            with taking_signals(stop):
                yield
        finally:
            for worker in self._workers.values():  # after an error of our own: leave no process behind
                worker.process.terminate()


class _Log:
    """A log file. Once writing fails it takes no more lines, but the worker's output is still read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None
        with self._may_fail():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")

    def write(self, line: str) -> None:
        if self._file is not None:
            with self._may_fail():
                self._file.write(line)
                self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            with self._may_fail():
                self._file.close()

    @contextmanager
    def _may_fail(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._file = None
            logger.warning("%s cannot be written, so the rest of the log is lost: %s", self._path, error)

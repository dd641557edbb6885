"""A rank that hangs leaves the others waiting forever in a collective: the watchdog names it and ends the job."""

import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from minima.engine import distributed
from minima.errors import RankHung

EXIT_CODE = 4  # of `minima stage`
_LONGEST_BEAT_SECONDS = 10.0
_ANSWER_SECONDS = 5.0
_STOOD_STILL_SECONDS = 5.0  # a delay this long: the machine was suspended, or this process was stopped and resumed
_GRACE_SECONDS = 2.0  # a launcher kills the rest a second after the first exit: the rank with the message exits first
# Source files on the stack of a rank that only waits: for other ranks, or for its device, which does.
_WAITING = (
    *("torch/distributed/", "deepspeed/comm/", "deepspeed/runtime/zero/"),
    *("torch/cuda/", "deepspeed/accelerator/", "deepspeed/utils/timer.py"),
)
_T = TypeVar("_T")
logger = logging.getLogger("minima.watchdog")


class Watchdog:
    """Watches one rank's training loop from a thread, and compares it with the others' when it makes no progress.

    Every rank reports its progress to the others through the process group's key-value store. A rank without progress
    for `seconds` reads the others' reports: the rank that has stopped reporting, or is furthest behind, or is not
    waiting in a collective while the others are, is the one that hangs. Every rank that still can then ends with exit
    code 4, so that the launcher ends the rest. Time in which this rank itself was stopped (Ctrl-Z, a suspended job)
    does not count, since the others may be resumed later.

    Args:
        seconds: without progress, after which the job is ended; 0 turns the watchdog off.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._beat_seconds = min(_LONGEST_BEAT_SECONDS, seconds / 4)
        self._progress, self._place, self._since = 0, "before the first step", time.monotonic()
        self._beat = 0
        self._asking: threading.Thread | None = None
        self._main = threading.get_ident()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        if self.seconds > 0:
            try:
                self._store = distributed.open_store("watchdog", timeout_seconds=_ANSWER_SECONDS)
            except RuntimeError as error:
                logger.warning("no watchdog: the ranks' key-value store cannot be reached a second time (%s)", error)
                return self
            self._since = time.monotonic()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def mark(self, place: str) -> None:
        """Record that the loop has reached `place`. Costs nothing; every rank makes the same sequence of marks."""
        self._place, self._since = place, time.monotonic()
        self._progress += 1

    def _watch(self) -> None:
        rank, world_size = distributed.rank(), distributed.world_size()
        while not self._wait():
            try:
                self._answered(lambda: self._tell(rank))
                if time.monotonic() - self._since > self.seconds:
                    self._end(rank, world_size)
            except (TimeoutError, RuntimeError) as error:  # of the store: rank 0 (or the launcher's agent) holds it
                logger.debug("rank %d cannot reach the other ranks' watchdogs: %s", rank, error)
                if time.monotonic() - self._since > self.seconds and not self._stopped.is_set():
                    verdict = f"rank 0 gave no sign of life while rank {rank} waited for {self.seconds:g} s ({error})"
                    self._leave(verdict, 0.0 if rank == 1 else _GRACE_SECONDS)

    def _wait(self) -> bool:
        """Wait for one beat, and return whether the watching is over."""
        began = time.monotonic()
        stopped = self._stopped.wait(self._beat_seconds)
        self._excuse(began, self._beat_seconds)
        return stopped

    def _excuse(self, began: float, seconds: float) -> None:
        """Restart the clock if what takes at most `seconds` took much longer: this process itself was stopped."""
        if time.monotonic() - began > seconds + _STOOD_STILL_SECONDS:
            self._since = time.monotonic()

    def _tell(self, rank: int) -> None:
        self._beat += 1
        frames = sys._current_frames().get(self._main)
        stack = traceback.extract_stack(frames)[-40:] if frames is not None else []
        said = {
            "beat": self._beat,
            "progress": self._progress,
            "place": self._place,
            "host": socket.gethostname(),
            "waiting": self._waits(),
            "at": f"{stack[-1].filename}:{stack[-1].lineno} ({stack[-1].name})" if stack else "unknown",
            "stack": "".join(traceback.format_list(stack[-8:])),
        }
        self._store.set(str(rank), json.dumps(said))

    def _waits(self) -> bool:
        """Whether a training thread waits: on a GPU, hooks of the backward pass run in autograd's threads."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        return any(
            part in frame.filename
            for thread, frames in sys._current_frames().items()
            if not names.get(thread, "").startswith("watchdog")
            for frame in traceback.extract_stack(frames)[-6:]
            for part in _WAITING
        )

    def _end(self, rank: int, world_size: int) -> None:
        before = self._answered(lambda: self._ask(world_size))
        for _ in range(3):  # a live rank reports in this time
            if self._wait():
                return
            self._answered(lambda: self._tell(rank))
        after = self._answered(lambda: self._ask(world_size))
        if time.monotonic() - self._since <= self.seconds:  # it was only slow
            return
        silent = [number for number in range(world_size) if after[number].get("beat") == before[number].get("beat")]
        speaker = min((number for number in range(world_size) if number not in silent), default=rank)
        self._leave(_verdict(after, silent, self.seconds), 0.0 if rank == speaker else _GRACE_SECONDS)

    def _answered(self, ask: Callable[[], _T]) -> _T:
        """The store's answer, requested from a thread: a stopped process that hosts the store would never answer.

        Raises:
            TimeoutError: no answer in time, to this request or an earlier one.
            RuntimeError: the connection is lost.
        """
        answers: list[_T] = []
        began = time.monotonic()

        def run() -> None:
            with suppress(Exception):
                answers.append(ask())

        if self._asking is None or not self._asking.is_alive():
            self._asking = threading.Thread(target=run, name="watchdog store", daemon=True)
            self._asking.start()
            self._asking.join(_ANSWER_SECONDS)
            self._excuse(began, _ANSWER_SECONDS)
        if self._asking.is_alive():
            raise TimeoutError(f"its key-value store has not answered in {_ANSWER_SECONDS:g} s")
        if not answers:
            raise RuntimeError("the connection to its key-value store is lost")
        return answers[0]

    def _ask(self, world_size: int) -> list[dict[str, Any]]:
        """Every rank's last report; empty for a rank that has never reported."""
        found = []
        for number in range(world_size):
            said = json.loads(self._store.get(str(number))) if self._store.check([str(number)]) else {}
            found.append(said)
        return found

    def _leave(self, verdict: str, wait_seconds: float) -> None:
        if wait_seconds:
            time.sleep(wait_seconds)
        else:
            error = RankHung(
                verdict,
                "the other ranks wait for it while their machines idle; the last complete checkpoint is intact",
                "run the same command again: it resumes from there. If it hangs at the same place, investigate what is "
                "named here; if the rank is only slow, raise watchdog_seconds",
            )
            sys.stderr.write(f"minima: {type(error).__name__}: {error}\n")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_CODE)


def _verdict(said: list[dict[str, Any]], silent: list[int], seconds: float) -> str:
    """Which rank hangs, judged by every rank's last report."""
    if silent:
        named = ", ".join(f"rank {number}{_host_text(said[number])}" for number in silent)
        return f"{named} gave no sign of life while the others waited for {seconds:g} s{_last_seen(said[silent[0]])}"
    least = min(facts["progress"] for facts in said)
    behind = [number for number, facts in enumerate(said) if facts["progress"] == least]
    if len(behind) == len(said):  # all at the same place: then those that are not waiting
        behind = [number for number in behind if not said[number]["waiting"]]
    if not behind or len(behind) == len(said):
        return f"no rank has made progress for {seconds:g} s, and none stands out from the others{_last_seen(said[0])}"
    named = ", ".join(f"rank {number}{_host_text(said[number])}" for number in behind)
    stack = said[behind[0]]["stack"]
    return f"{named} hangs: no progress for {seconds:g} s{_last_seen(said[behind[0]])}\nits stack:\n{stack}".rstrip()


def _host_text(facts: dict[str, Any]) -> str:
    return f" on {facts['host']}" if facts else ""


def _last_seen(facts: dict[str, Any]) -> str:
    return f"; it was last seen at {facts['place']}, in {facts['at']}" if facts else ""

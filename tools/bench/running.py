"""Turn by turn: a fresh process group for each, in alternating order."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from minima.launcher import child_environment, free_port

from .profiles import Profile, Row

Found = dict[str, Any]
_FAILED: Found = {"status": "failed", "reason": "its process group failed; see its output"}


def turn_order(rows: tuple[Row, ...]) -> list[Row]:
    """A B C, C B A, A B C and so on: what drifts in the machine reaches every row alike."""
    order: list[Row] = []
    for turn in range(max((row.turns for row in rows), default=0)):
        due = [row for row in rows if turn < row.turns]
        order += due if turn % 2 == 0 else reversed(due)
    return order


def start(
    script: Path,
    profile: Profile,
    rows: list[Row],
    scratch: Path,
    *,
    ceiling: bool = False,
    alone: bool = False,
    timeout: float = 1800,
) -> Found | None:
    """Run rows in a process group of their own.

    Args:
        script: the program whose `--worker TASK` does the work.
        ceiling: measure the ceilings, of matmuls and of memory, first.
        alone: one process without a group, with as many threads as a rank has: for losses alone.
        timeout: seconds after which its ranks are ended.

    Returns:
        `rows`, what rank 0 found of each, and `ceiling`; None when a rank failed, with the end of its output on
        standard error.
    """
    ranks = 1 if alone else profile.ranks
    threads = threads_of(profile.ranks)
    result, task = scratch / "result.json", scratch / "task.json"
    result.unlink(missing_ok=True)
    given = {"profile": profile.name, "rows": [dataclasses.asdict(row) for row in rows], "ceiling": ceiling}
    given |= {"steps": profile.steps, "loss_repeats": profile.loss_repeats}
    task.write_text(json.dumps(given | {"alone": alone, "result": str(result)}))
    port, processes, logs = free_port(), [], []
    for rank in range(ranks):
        place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
        environment = child_environment(ranks) | {name: str(value) for name, value in place.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TRL_EXPERIMENTAL_SILENCE": "1"}
        environment |= {"OMP_NUM_THREADS": str(threads)}
        log = scratch / f"rank-{rank}.log"
        with open(log, "wb") as output:
            command = [sys.executable, str(script), "--worker", str(task)]
            processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
        logs.append(log)
    if _wait(processes, timeout) or not result.is_file():
        for log in logs:
            print(log.read_text(errors="replace")[-1500:], file=sys.stderr)
        return None
    return json.loads(result.read_text())


def threads_of(ranks: int) -> int:
    """Threads of each rank."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def _wait(processes: list[subprocess.Popen], timeout: float) -> bool:
    """Wait for all; once one has failed, or the time is over, end the others. Whether any failed."""
    deadline = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process in processes):
            if any(process.returncode for process in processes) or time.monotonic() > deadline:
                return True
            time.sleep(0.05)
        return any(process.returncode for process in processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def largest_that_fits(row: Row, sizes: tuple[int, ...], attempt: Callable[[Row], Found]) -> tuple[Row | None, Found]:
    """The row at the largest micro-batch that fits, by trying them from the smallest, and what the last try found.

    Returns:
        None instead of the row where not even the smallest was measured; what was found then says why.
    """
    fitting, found = None, _FAILED
    for size in sizes:
        sized = replace(row, micro_batch=size)
        found = attempt(sized)
        if found["status"] != "measured":
            break
        fitting = sized
    return fitting, found


class Run:
    """One run of a profile: what each turn of each row found.

    Args:
        profile: what to measure.
        script: the program, for its worker processes.
        scratch: a folder for tasks and logs.
        say: is told what happens.
    """

    def __init__(self, profile: Profile, script: Path, scratch: Path, say: Callable[[str], None] = print) -> None:
        self.profile, self.script, self.scratch, self.say = profile, script, scratch, say
        self.turns: dict[str, list[Found]] = {row.name: [] for row in profile.rows}
        self.ceilings: dict[str, list[float]] = {}
        self._done: list[Row] = []

    def run(self) -> None:
        """Measure all of it."""
        if self.profile.shared_process:
            self._at_once()
            return
        self._ceiling()
        rows = tuple(self._sized(row) for row in self.profile.rows)
        for row in (order := turn_order(tuple(row for row in rows if row.micro_batch))):
            self._turn(row, f"[{len(self._done) + 1}/{len(order)}] ")
        self._ceiling()

    def _at_once(self) -> None:
        """Every row in one process group, with the largest micro-batch taken for the one that fits."""
        rows = [
            row if row.micro_batch else replace(row, micro_batch=self.profile.micro_batches_to_try[-1])
            for row in self.profile.rows
        ]
        found = start(self.script, self.profile, rows, self.scratch, ceiling=True) or {"rows": [_FAILED] * len(rows)}
        self._keep_ceiling(found.get("ceiling", {}))
        for row, one in zip(rows, found["rows"], strict=True):
            self._keep(row, one)

    def _ceiling(self) -> None:
        self._keep_ceiling((start(self.script, self.profile, [], self.scratch, ceiling=True) or {}).get("ceiling", {}))

    def _keep_ceiling(self, found: dict[str, float]) -> None:
        for name, rate in found.items():
            self.ceilings.setdefault(name, []).append(rate)
        units = {"memory": "GB/s of copying"}
        shown = (f"{name} {rate / 1e9:,.0f} {units.get(name, 'GFLOP/s')}" for name, rate in found.items())
        self.say("ceilings: " + ", ".join(shown))

    def _sized(self, row: Row) -> Row:
        if row.micro_batch:
            return row
        sizes = self.profile.micro_batches_to_try
        largest, found = largest_that_fits(row, sizes, self._attempt)
        if largest is None:
            if found["status"] == "out of memory":
                found = found | {"reason": f"not even {sizes[0]} sequence fits"}
            self._keep(row, found)
            return row
        ended = "" if found["status"] in ("measured", "out of memory") else f" (the next one {found['status']})"
        self.say(f"{row.name}: a micro-batch of {largest.micro_batch} is the largest of {sizes} that fits{ended}")
        return largest

    def _attempt(self, row: Row) -> Found:
        found = start(self.script, self.profile, [row], self.scratch, alone=row.group == "loss")
        return found["rows"][0] if found else _FAILED

    def _turn(self, row: Row, place: str) -> None:
        self._done.append(row)
        earlier = self.turns[row.name]
        if not earlier or earlier[-1]["status"] == "measured":
            self._keep(row, self._attempt(row), place)

    def _keep(self, row: Row, one: Found, place: str = "") -> None:
        self.turns[row.name].append(one)
        if one["status"] != "measured":
            self.say(f"{place}{row.name}: {one['status']}: {one.get('reason', '')}")
            return
        each = ", ".join(f"{seconds:.2f}" for seconds in one["seconds"])
        worked = ", ".join(f"{seconds:.2f}" for seconds in one["processor_seconds"])
        self.say(
            f"{place}{row.name}: {each} s (processor {worked}), {one['peak_above_idle_bytes'] / 1e9:.2f} GB above idle"
        )

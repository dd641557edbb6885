"""Running the turns: each in a fresh process group, in alternating order."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from minima.launcher import child_environment, free_port

from .profiles import Profile, Row

Found = dict[str, Any]
_FAILED: Found = {"status": "failed", "reason": "its process group failed; see its output"}
_NOT_REACHED: Found = {"status": "failed", "reason": "its process group failed in an earlier row"}


def turn_order(rows: tuple[Row, ...]) -> list[Row]:
    """A B C, C B A, A B C and so on, so that drift of the machine affects all rows alike."""
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
    sizes: tuple[int, ...] = (),
    num_kernels: int = 0,
    traces: str = "",
    timeout: float = 1800,
) -> Found:
    """Run rows in a new process group.

    Args:
        script: the program whose `--worker TASK` does the work.
        ceiling: measure the ceilings of matmuls and memory first.
        alone: one process without a process group, with as many threads as a rank; for losses alone.
        sizes: instead of timing the row, find the largest of these micro-batches that fits.
        num_kernels: number of GPU kernels to list with the time they took in one more step.
        traces: folder for a trace of that step.
        timeout: seconds after which its ranks are killed.

    Returns:
        `rows`, rank 0's result for each, and `ceiling`. If a rank failed, the end of every rank's output is printed to
        standard error, and unfinished rows are marked as failed, those after the first of them as not reached.
    """
    ranks = 1 if alone else profile.ranks
    threads = threads_of(profile.ranks)
    result, task = scratch / "result.json", scratch / "task.json"
    result.unlink(missing_ok=True)
    given = {"profile": profile.name, "rows": [dataclasses.asdict(row) for row in rows], "ceiling": ceiling}
    given |= {"steps": profile.steps, "loss_repeats": profile.loss_repeats, "sizes": sizes, "alone": alone}
    task.write_text(json.dumps(given | {"num_kernels": num_kernels, "traces": traces, "result": str(result)}))
    port, processes, logs = free_port(), [], []
    for rank in range(ranks):
        place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
        environment = child_environment(ranks) | {name: str(value) for name, value in place.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TRL_EXPERIMENTAL_SILENCE": "1"}
        environment |= {"OMP_NUM_THREADS": str(threads)}
        # with PYTHONSAFEPATH, a script does not find what lies beside it
        found = [str(script.parent), environment.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, found))
        log = scratch / f"rank-{rank}.log"
        with open(log, "wb") as output:
            command = [sys.executable, str(script), "--worker", str(task)]
            processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
        logs.append(log)
    if _wait(processes, timeout) or not result.is_file():
        for log in logs:
            print(log.read_text(errors="replace")[-1500:], file=sys.stderr)
    found = _read(scratch)
    missing = len(rows) - len(found["rows"])
    found["rows"] += [_FAILED, *[_NOT_REACHED] * (missing - 1)] if missing else []
    return found


def _read(scratch: Path) -> Found:
    """The results that the latest process group has written so far."""
    result = scratch / "result.json"
    return json.loads(result.read_text()) if result.is_file() else {"rows": [], "ceiling": {}}


def threads_of(ranks: int) -> int:
    """The number of threads per rank."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def _wait(processes: list[subprocess.Popen], timeout: float) -> bool:
    """Wait for all processes; if one fails or the time is up, kill the others. Returns whether that happened."""
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


def process_groups(order: Sequence[Row], sharing: Collection[str]) -> list[list[Row]]:
    """The turns that each process group runs: one, or consecutive ones of the same group if its rows may share."""
    found: list[list[Row]] = []
    for row in order:
        if found and row.group in sharing and row.group == found[-1][0].group and row not in found[-1]:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def largest_that_fits(row: Row, sizes: Sequence[int], attempt: Callable[[Row], Found]) -> Found:
    """Find the largest micro-batch that fits by trying them from the smallest.

    Args:
        row: with any micro-batch.
        sizes: numbers of sequences in ascending order.
        attempt: runs a row; the result's `status` is `measured` if it fits.

    Returns:
        The result of the last attempt, with `micro_batch`: the largest that fits, 0 if none does.
    """
    fitting, found = 0, _FAILED
    for size in sizes:
        found = attempt(replace(row, micro_batch=size))
        if found["status"] != "measured":
            break
        fitting = size
    return found | {"micro_batch": fitting}


class Run:
    """One run of a profile, with the results of each turn of each row.

    Args:
        profile: what to measure.
        script: the program, for its worker processes.
        scratch: a folder for tasks and logs.
        say: called with progress messages.
        largest: for rows that use the largest micro-batch that fits, sizes known from an earlier run, by name.
        num_kernels: number of GPU kernels to list for each of minima's own steps.
        traces: folder for traces of these steps.
    """

    def __init__(
        self,
        profile: Profile,
        script: Path,
        scratch: Path,
        say: Callable[[str], None] = print,
        largest: Mapping[str, int] | None = None,
        num_kernels: int = 0,
        traces: str = "",
    ) -> None:
        self.profile, self.script, self.scratch, self.say = profile, script, scratch, say
        self.num_kernels, self.traces = num_kernels, traces
        self.turns: dict[str, list[Found]] = {row.name: [] for row in profile.rows}
        self.ceilings: dict[str, list[float]] = {}
        self._largest = dict(largest or {})
        self._num_done = 0

    def run(self) -> None:
        """Measure all rows and the ceilings."""
        if self.profile.shared_process:
            self._at_once()
            return
        order = turn_order(self.profile.rows)
        groups = process_groups(order, self.profile.sharing_groups)
        # On a CPU, ceilings get their own processes: what they leave on the heap would count as a row's idle memory.
        apart = self.profile.device != "cuda" or all(rows[0].group == "loss" for rows in groups)
        with_engines = [number for number, rows in enumerate(groups) if rows[0].group != "loss"]
        ends = [] if apart else [with_engines[0], with_engines[-1]]
        if apart:
            self._ceiling()
        for number, together in enumerate(groups):
            self._turn(together, len(order), ceiling=number in ends)
        if apart:
            self._ceiling()

    def _at_once(self) -> None:
        """Run every row in one process group, assuming that the largest micro-batch fits."""
        rows = [
            row if row.micro_batch else replace(row, micro_batch=self.profile.micro_batches_to_try[-1])
            for row in self.profile.rows
        ]
        found = start(self.script, self.profile, rows, self.scratch, ceiling=True)
        self._keep_ceiling(found["ceiling"])
        for row, one in zip(rows, found["rows"], strict=True):
            self._keep(row, one)

    def _ceiling(self) -> None:
        self._keep_ceiling(start(self.script, self.profile, [], self.scratch, ceiling=True)["ceiling"])

    def _keep_ceiling(self, found: dict[str, float]) -> None:
        for name, rate in found.items():
            self.ceilings.setdefault(name, []).append(rate)
        if not found:
            return
        units = {"memory": "GB/s of copying"}
        shown = (f"{name} {rate / 1e9:,.0f} {units.get(name, 'GFLOP/s')}" for name, rate in found.items())
        self.say("ceilings: " + ", ".join(shown))

    def _sized(self, row: Row) -> Row:
        """The row with the largest micro-batch that fits, unless it specifies one; 0 if none fits."""
        if row.micro_batch:
            return row
        eager = replace(row, what=row.what.removesuffix("_compiled")).name
        if row.name not in self._largest and self._largest.get(eager):  # saves compiling each; needs no more memory
            self._largest[row.name] = self._largest[eager]
        if row.name not in self._largest:
            sizes = self.profile.micro_batches_to_try
            found = self._start([row], sizes=sizes)["rows"][0]
            largest = self._largest[row.name] = found.get("micro_batch", 0)
            if largest:
                ended = f" (the next one failed: {found['reason']})" if found["status"] == "failed" else ""
                self.say(f"{row.name}: a micro-batch of {largest} is the largest of {sizes} that fits{ended}")
            else:
                small = {"reason": f"not even {sizes[0]} sequence fits"} if found["status"] == "out of memory" else {}
                self._keep(row, found | small)
        return replace(row, micro_batch=self._largest[row.name])

    def _start(self, rows: list[Row], **options: Any) -> Found:
        alone = rows[0].group == "loss"
        return start(self.script, self.profile, rows, self.scratch, alone=alone, **options)

    def _turn(self, rows: list[Row], num_turns: int, *, ceiling: bool) -> None:
        """Time rows in one process group, and in another those that its failure left out.

        Rows whose last turn failed are skipped.
        """
        due = [row for row in rows if not self.turns[row.name] or self.turns[row.name][-1]["status"] == "measured"]
        due = [sized for row in due if (sized := self._sized(row)).micro_batch]
        if not due:
            return
        options = {"num_kernels": self.num_kernels, "traces": self.traces}
        try:
            found = self._start(due, ceiling=ceiling, **options)
        except BaseException:  # stopped: keep the finished rows of this process group
            for row, one in zip(due, _read(self.scratch)["rows"], strict=False):
                self._keep(row, one)
            raise
        self._keep_ceiling(found["ceiling"])
        left_out = [row for row, one in zip(due, found["rows"], strict=True) if one is _NOT_REACHED]
        for row, one in zip(due[: len(due) - len(left_out)], found["rows"], strict=False):
            while one["status"] == "out of memory" and (row := self._smaller(row)).micro_batch:
                one = self._start([row], **options)["rows"][0]
            self._num_done += 1
            self._keep(row, one, f"[{self._num_done}/{num_turns}] ")
        if left_out:
            self._turn(left_out, num_turns, ceiling=ceiling and not found["ceiling"])

    def _smaller(self, row: Row) -> Row:
        """The row with the next smaller micro-batch if its size was searched for: many steps may need more than two."""
        if row.name not in self._largest:
            return replace(row, micro_batch=0)
        smaller = max((size for size in self.profile.micro_batches_to_try if size < row.micro_batch), default=0)
        self.say(f"{row.name}: a micro-batch of {row.micro_batch} ran out of memory after all")
        self._largest[row.name] = smaller
        return replace(row, micro_batch=smaller)

    def _keep(self, row: Row, one: Found, place: str = "") -> None:
        self.turns[row.name].append(one)
        if one["status"] != "measured":
            self.say(f"{place}{row.name}: {one['status']}: {one.get('reason', '')}")
            return
        each = ", ".join(f"{seconds:.2f}" for seconds in one["seconds"])
        worked = ", ".join(f"{seconds:.2f}" for seconds in one["processor_seconds"])
        self.say(f"{place}{row.name}: {each} s (CPU {worked}), {one['peak_above_idle_bytes'] / 1e9:.2f} GB above idle")

"""Write checkpoints while training goes on: a snapshot in memory, files from a thread, a marker once all are there."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from minima.disk import file_sha256, json_sha256, sync
from minima.disk_errors import is_no_space
from minima.engine import distributed
from minima.engine.checkpoint.store import FORMAT, remove, remove_old
from minima.errors import CheckpointError, DiskFull, MinimaError
from minima.models.layout import MARKER, step_folder

WriteFiles = Callable[[Path], list[Path]]  # writes this rank's files into a folder, and returns them


@dataclass
class _Report:
    """What one rank wrote for one checkpoint; sent to the other ranks."""

    failure: str | None = None
    full: bool = False
    sha256: dict[str, str] = field(default_factory=dict)
    num_bytes: int = 0
    seconds: float = 0.0


class CheckpointWriter:
    """Writes a stage's checkpoints, at most one at a time. Every rank makes every call, in the same order.

    `begin` returns once the files are being written. The checkpoint counts only after `finish`, which the ranks call
    together: the loop does so after the first step before which none of them was still writing.

    Args:
        folder: holds the stage's checkpoints.
        keep: how many of the newest stay; 0 keeps all.
        keep_every_steps: checkpoints at multiples of this many steps stay, too; 0 for none.
        named: checkpoints at these steps stay, too.

    Attributes:
        waited_seconds: time that training on this rank has waited for checkpoints since the last `take_times`.
        last_seconds: time from `begin` until the last finished checkpoint was on disk, on the slowest rank.
        last_bytes: size of its files, over all ranks.
    """

    def __init__(self, folder: Path, keep: int, keep_every_steps: int = 0, named: Collection[int] = ()) -> None:
        self.folder, self.keep, self.keep_every_steps, self.named = folder, keep, keep_every_steps, named
        self.waited_seconds = self.last_seconds = 0.0
        self.last_bytes = 0
        self._thread: threading.Thread | None = None

    @property
    def writing(self) -> bool:
        """Whether this rank's files are not all on disk yet."""
        return self._thread is not None and self._thread.is_alive()

    def begin(
        self, step: int, snapshot: Callable[[], WriteFiles], facts: dict[str, Any], spare: int | None = None
    ) -> None:
        """Take a snapshot and start writing it; waits for the previous checkpoint if it is still being written.

        Args:
            step: finished updates.
            snapshot: copies this rank's state, and returns a function that writes the copy.
            facts: the marker's content besides format, checksums and cost; rank 0's is used.
            spare: the checkpoint at this step stays, too.

        Raises:
            DiskFull, CheckpointError: this checkpoint or the previous one cannot be written; on every rank.
        """
        self.finish()
        began = time.perf_counter()
        final = step_folder(self.folder, step)
        self._began, self._final, self._facts, self._spare = began, final, facts, spare
        self._partial = final.with_name(final.name + ".partial")
        self._report = _Report()
        try:
            if distributed.is_main():
                shutil.rmtree(self._partial, ignore_errors=True)
                self._partial.mkdir(parents=True)
        except OSError as error:
            self._report = _Report(str(error), is_no_space(error))
        failure, full = self._report.failure, self._report.full
        distributed.raise_together(None if failure is None else _cannot_write(self._partial, [failure], full))
        self._thread = threading.Thread(target=self._write, args=(snapshot(),), name="checkpoint", daemon=True)
        self._thread.start()
        self.waited_seconds += time.perf_counter() - began

    def finish(self) -> None:
        """Wait for all ranks' files and complete the checkpoint; does nothing if none is being written.

        Raises:
            DiskFull, CheckpointError: a rank could not write; on every rank. Earlier checkpoints stay complete.
        """
        if self._thread is None:
            return
        began = time.perf_counter()
        self._thread.join()
        self._thread = None
        reports: list[_Report] = distributed.gather_objects(self._report)
        failures = [f"rank {rank}: {report.failure}" for rank, report in enumerate(reports) if report.failure]
        full = any(report.full for report in reports)
        self.last_bytes = sum(report.num_bytes for report in reports)
        self.last_seconds = max(report.seconds for report in reports)
        if not failures and distributed.is_main():
            hashes = {name: digest for report in reports for name, digest in report.sha256.items()}
            cost = {"save_seconds": round(self.last_seconds, 3), "save_bytes": self.last_bytes}
            try:
                _complete(self._partial, self._final, self._facts | cost | {"sha256": hashes})
            except OSError as error:
                failures, full = [f"rank 0: {error}"], is_no_space(error)
        failures, full = distributed.broadcast_object((failures, full))
        if failures:
            if distributed.is_main():
                shutil.rmtree(self._partial, ignore_errors=True)
            raise _cannot_write(self._partial, failures, full)
        if distributed.is_main():
            spare = [*self.named, *([] if self._spare is None else [self._spare])]
            remove_old(self.folder, self.keep, self.keep_every_steps, spare)
        self.waited_seconds += time.perf_counter() - began

    def take_times(self) -> dict[str, float]:
        """What checkpoints have cost since the last call, for a log record; empty if there were none."""
        if not self.waited_seconds:
            return {}
        times = {"checkpoint_wait_seconds": round(self.waited_seconds, 4)}
        if self.last_bytes:
            times |= {"checkpoint_seconds": round(self.last_seconds, 4), "checkpoint_bytes": float(self.last_bytes)}
        self.waited_seconds, self.last_bytes = 0.0, 0
        return times

    def _write(self, write_files: WriteFiles) -> None:
        try:
            for path in write_files(self._partial):
                sync(path)
                self._report.sha256[path.name] = file_sha256(path)
                self._report.num_bytes += path.stat().st_size
        except (OSError, SafetensorError) as error:
            self._report.failure, self._report.full = str(error) or type(error).__name__, is_no_space(error)
        except Exception as error:  # all ranks must hear of it: the thread alone would end silently
            self._report.failure = f"{type(error).__name__}: {error}"
        self._report.seconds = time.perf_counter() - self._began


def _complete(partial: Path, final: Path, facts: dict[str, Any]) -> None:
    marker = partial / MARKER
    content = {"format": FORMAT, **facts}
    marker.write_text(json.dumps(content | {"marker_sha256": json_sha256(content)}, indent=1), encoding="utf-8")
    sync(marker)
    sync(partial)
    remove(final)  # the same step, saved before a run went back to an earlier one
    partial.rename(final)
    sync(final.parent)


def _cannot_write(partial: Path, failures: list[str], full: bool) -> MinimaError:
    why = "the run cannot continue without a place for its checkpoints; earlier checkpoints are still complete"
    if full:
        return DiskFull(
            f"no space left for {partial}: {'; '.join(failures)}",
            why,
            "free some space (or lower keep_checkpoints), then run again: the run resumes from its last checkpoint",
        )
    return CheckpointError(
        f"{partial} could not be written: {'; '.join(failures)}", why, "fix the cause, then run again"
    )

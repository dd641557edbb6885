"""A run's metrics log: always JSON lines, and TensorBoard and Weights & Biases on request."""

import json
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minima.disk import no_link, write_whole
from minima.disk_errors import file_named
from minima.errors import RecipeError, first_line

_CHUNK_BYTES = 1 << 16  # some hundred records
logger = logging.getLogger("minima.metrics")


class MetricsLog:
    """Writes each record to every destination; exists on rank 0 only.

    Args:
        folder: the stage's; receives `metrics.jsonl`, `run_id` and `tensorboard/`.
        first_step: finished steps at the (re)start. Later records, of updates that were lost, are removed.
        tensorboard: also write TensorBoard events.
        wandb_project: also log to this Weights & Biases project.
        name: the run's name there; `GROUP/NAME` for a run of a group.
        config: what Weights & Biases shows as the run's configuration.

    Raises:
        RecipeError: Weights & Biases is requested, but is not installed or has no key or network.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        *,
        tensorboard: bool = False,
        wandb_project: str | None = None,
        name: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self.run_id = _run_id(folder / "run_id")
        # The file of a long run has hundreds of megabytes, so a start reads only its end, and rewrites nothing.
        ends = ((record["step"], end) for record, end in records_from_end(self.path) if record["step"] <= first_step)
        last, end = next(ends, (0, 0))
        if last < first_step:  # a checkpoint is written after the record of its step
            logger.warning(
                "%s: the records of steps %d to %d are lost; the training itself continues after step %d",
                self.path, last + 1, first_step, first_step,
            )  # fmt: skip
        with file_named(self.path):
            _make_own(self.path)
            self._file = open(self.path, "a", encoding="utf-8", opener=no_link)  # noqa: SIM115
            self._file.truncate(end)
            self._file.write("\n" if end else "")  # a killed run may have written a record without its end
            self._file.flush()
            os.fsync(self._file.fileno())
        self._tensorboard = self._wandb = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        if wandb_project is not None:
            try:
                import wandb
            except ImportError as error:
                raise RecipeError(
                    f"wandb_project is {wandb_project!r}, but wandb is not installed",
                    "the run would not be logged where you expect it",
                    "pip install wandb, or remove the key",
                ) from error
            group = name.rpartition("/")[0] if name else None
            try:
                self._wandb = wandb.init(
                    project=wandb_project, id=self.run_id, resume="allow", name=name, group=group, config=config
                )
            except wandb.Error as error:
                raise RecipeError(
                    f"wandb_project is {wandb_project!r}, but Weights & Biases cannot be started: {first_line(error)}",
                    "the run would not be logged where you expect it",
                    "run `wandb login`; without a network, export WANDB_MODE=offline and `wandb sync` its folder later;"
                    " or remove the key",
                ) from error

    def write(self, record: dict[str, Any]) -> None:
        """Write one record: a `step` and numbers."""
        with file_named(self.path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            # The checkpoint that follows is synced, too, and must not outlive its records.
            os.fsync(self._file.fileno())
        numbers = {name: value for name, value in record.items() if name != "step" and value is not None}
        if self._tensorboard is not None:
            with file_named(self.path.with_name("tensorboard")):
                for name, value in numbers.items():
                    self._tensorboard.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=record["step"])

    def close(self) -> None:
        """Flush everything."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _run_id(path: Path) -> str:
    """The stage's run id, the same for all its restarts."""
    try:
        kept = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        kept = ""
    except UnicodeDecodeError:
        logger.warning("%s is damaged: the stage continues under a new id, so Weights & Biases starts a new run", path)
        kept = ""
    if not kept:
        kept = uuid.uuid4().hex
        write_whole(path, kept)
    return kept


def _make_own(path: Path) -> None:
    """Replace a file that others may read by a link to it, or that cannot be written to, by a copy."""
    if path.is_symlink() or (path.exists() and (path.stat().st_nlink > 1 or not os.access(path, os.W_OK))):
        write_whole(path, path.read_bytes() if path.is_file() else b"")


def records_from_end(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The records of a `metrics.jsonl`, the last one first, each with the position of its end in the file.

    Lines that a killed run or a power cut has damaged are skipped.
    """
    if not path.is_file():
        return
    with file_named(path), path.open("rb") as file:
        start = end = file.seek(0, os.SEEK_END)
        rest = b""
        while start:
            size = min(_CHUNK_BYTES, start)
            start -= size
            file.seek(start)
            rest, *lines = (file.read(size) + rest).split(b"\n")
            for line in reversed(lines if start else [rest, *lines]):  # before the file's start, `rest` is incomplete
                if (record := _record(line)) is not None:
                    yield record, end
                elif line:
                    logger.warning("%s: skipped a truncated line", path)
                end -= len(line) + 1


def last_with(path: Path, name: str, step: int | None = None) -> dict[str, Any] | None:
    """The last record of a `metrics.jsonl` that has a value of this name, of any step or of the given one."""
    named = (record for record, _ in records_from_end(path) if name in record)
    return next((record for record in named if step in (None, record["step"])), None)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None

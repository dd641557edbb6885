"""A run's metrics log: always JSON lines, and TensorBoard and Weights & Biases on request."""

import json
import logging
import os
import uuid
from pathlib import Path
from typing import Any

from minima.disk import write_whole
from minima.disk_errors import file_named
from minima.errors import RecipeError, first_line

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
        kept = [record for record in read_records(self.path) if record["step"] <= first_step]
        last = max((record["step"] for record in kept), default=0)
        if last < first_step:  # a checkpoint is written after the record of its step
            logger.warning(
                "%s: the records of steps %d to %d are lost; the training itself continues after step %d",
                self.path, last + 1, first_step, first_step,
            )  # fmt: skip
        write_whole(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = self.path.open("a", encoding="utf-8")
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


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the records of a `metrics.jsonl`; lines that a killed run or a power cut has damaged are skipped."""
    records = []
    with file_named(path):
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        else:
            logger.warning("%s: skipped a truncated line", path)
    return records

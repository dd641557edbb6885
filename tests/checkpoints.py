"""Checkpoints for tests that only need one to be there."""

from pathlib import Path
from typing import Any

from minima.engine.checkpoint.writer import CheckpointWriter, WriteFiles
from minima.models.layout import step_folder


def write_checkpoint(folder: Path, step: int, write_files: WriteFiles, facts: dict[str, Any], keep: int) -> Path:
    """Write one and wait for it; every rank calls it. Gives its folder."""
    writer = CheckpointWriter(folder, keep)
    writer.begin(step, lambda: write_files, facts)
    writer.finish()
    return step_folder(folder, step)

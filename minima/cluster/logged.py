"""What a stage's folder says of how far it has come: its newest checkpoint and its last line of metrics. No torch."""

import json
from pathlib import Path
from typing import Any

from minima.models.layout import MARKER, complete_steps, step_folder

_TAIL_BYTES = 65536  # of metrics.jsonl: some hundred records


def newest_checkpoint(stage_folder: Path) -> dict[str, Any] | None:
    """What the newest complete checkpoint of a stage says of itself; None when there is none."""
    checkpoints = stage_folder / "checkpoints"
    try:
        steps = complete_steps(checkpoints)
    except PermissionError:  # somebody else's run
        return None
    for step in reversed(steps):
        try:
            marker = json.loads((step_folder(checkpoints, step) / MARKER).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # removed or replaced while we look
            continue
        if isinstance(marker, dict):
            return marker
    return None


def last_record(path: Path) -> dict[str, Any]:
    """The last whole record of a training step."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:  # being written, or cut
            continue
        if isinstance(record, dict) and "loss" in record and "tokens_per_second" in record:
            return record
    return {}

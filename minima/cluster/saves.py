"""Whether a stage's save fits the time that a job has for it, as far as a save was measured. No torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minima.cluster import slurm
from minima.cluster.render import Place
from minima.errors import ClusterError
from minima.models.layout import MARKER, complete_steps, step_folder
from minima.recipe.schema import AnyStage

_MARGIN = 1.5  # a save behind a busy file system takes longer than the last one did; the step's end comes first


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


def save_warnings(stages: Sequence[AnyStage], place: Place, dry_run: bool) -> list[str]:
    """Stages whose measured save may not end before its job does.

    Args:
        stages: to be submitted.
        place: with their cluster file.
        dry_run: ask Slurm nothing.
    """
    warnings = []
    for stage in stages:
        marker = newest_checkpoint(place.run_folder / stage.name) or {}
        seconds, lead = marker.get("save_seconds"), place.cluster.signal_lead_seconds
        if not isinstance(seconds, int | float):
            continue
        if seconds * _MARGIN > lead:
            warnings.append(
                f"{stage.name}: its last save took {seconds:.0f} s, and the ranks are told to save {lead} s before the "
                f"time limit: set signal_lead_seconds to {seconds * 2 + 60:.0f} or more"
            )
        grace = None if dry_run else _grace_seconds(place.cluster.resources(stage).partition)
        if grace is not None and seconds * _MARGIN > grace:
            warnings.append(
                f"{stage.name}: its last save took {seconds:.0f} s, and a preempted job of this partition has "
                f"GraceTime={grace} s: what a preemption interrupts goes back to the newest checkpoint"
            )
    return warnings


def _grace_seconds(partition: str | None) -> int | None:
    """GraceTime of a partition whose jobs can be preempted; None where they cannot, or Slurm does not say."""
    if partition is None:
        return None
    try:
        text = slurm.call(["scontrol", "show", "partition", "--oneliner", partition], "asked for its grace time")
    except ClusterError:
        return None
    fields = dict(part.split("=", 1) for part in text.split() if "=" in part)
    grace = fields.get("GraceTime", "")
    return int(grace) if fields.get("PreemptMode", "OFF") != "OFF" and grace.isdigit() else None

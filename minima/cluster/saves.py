"""Checks whether a save, if one was measured, fits into the time that a job has for it. No torch."""

import functools
from collections.abc import Sequence
from pathlib import Path

from minima.cluster import slurm
from minima.cluster.progress import last_record, newest_checkpoint
from minima.cluster.render import Place
from minima.recipe.schema import AnyStage

_MARGIN = 1.5  # a save to a busy file system may take longer than the last one
_STEPS = 2  # steps before the save: ranks agree on a signal when a step starts, and save when it ends


def save_warnings(stages: Sequence[AnyStage], place: Place, dry_run: bool) -> list[str]:
    """Warnings about stages whose save, as last measured, may take longer than the job has left for it.

    Args:
        dry_run: do not query Slurm.
    """
    warnings = []
    for stage in stages:
        marker = newest_checkpoint(place.run_folder / stage.name) or {}
        seconds, lead = marker.get("save_seconds"), place.cluster.signal_lead_seconds
        if not isinstance(seconds, int | float):
            continue
        steps = _STEPS * _step_seconds(place.run_folder / stage.name)
        took = f"its last save took {seconds:.0f} s" + (f" and two steps {steps:.0f} s" if steps >= 1 else "")
        if seconds * _MARGIN + steps > lead:
            warnings.append(
                f"{stage.name}: {took}, but the ranks are told to save only {lead} s before the time limit: set "
                f"signal_lead_seconds to {seconds * 2 + steps + 60:.0f} or more"
            )
        grace = None if dry_run else _grace_seconds(place.cluster.resources(stage).partition)
        if grace is not None and seconds * _MARGIN + steps > grace:
            warnings.append(
                f"{stage.name}: {took}, but a preempted job of this partition has only GraceTime={grace} s: if that "
                "cuts off its save, it resumes from the newest complete checkpoint"
            )
    return warnings


def _step_seconds(stage_folder: Path) -> float:
    """Seconds per step, as last logged; 0 if nothing was."""
    record = last_record(stage_folder / "metrics.jsonl")
    step, tokens, speed = record.get("step"), record.get("tokens"), record.get("tokens_per_second")
    return tokens / step / speed if step and tokens and speed else 0.0


@functools.cache  # a grid calls this for each of its cells
def _grace_seconds(partition: str | None) -> int | None:
    """GraceTime of a partition whose jobs can be preempted; None if they cannot, or if Slurm does not say."""
    for fields in slurm.shown("partition", partition) if partition is not None else ():
        grace = fields.get("GraceTime", "")
        if fields.get("PreemptMode", "OFF") != "OFF" and grace.isdigit():
            return int(grace)
    return None

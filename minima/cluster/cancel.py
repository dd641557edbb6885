"""`minima cancel`: ends a run's jobs, letting running ones save first. No torch."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from minima.cluster import slurm
from minima.cluster.jobs import FOLDER, Job, note_cancelled, read_jobs
from minima.cluster.queued import lost_jobs
from minima.cluster.runs import open_run
from minima.errors import MinimaError, first_line
from minima.stages.lock import run_lock

_SUBMISSION_SECONDS = 10.0  # how long a `minima submit` that is under way may hold up the record


def cancel(run: str, write: Callable[[str], None]) -> int:
    """Cancel a run's jobs: first the waiting ones, so that none of them starts, then the running ones.

    Only a running job's script gets the signal; it passes it on to its ranks, and cancels the job once they have saved.
    After a plain `scancel`, Slurm would kill the ranks after its KillWait (30 s by default).

    Args:
        run: its folder, or its recipe.

    Raises:
        MinimaError: there is no such run, or Slurm refuses.
    """
    _, folder = open_run(run)
    jobs = [*read_jobs(folder), *lost_jobs(folder)]
    by_id = {job.id: job for job in jobs}
    names = [(job.id, job.name) for job in jobs]
    cancelled: list[Job] = []
    try:
        waiting = dict.fromkeys(task.job for task in reversed(slurm.tasks(names)) if task.state == "PENDING")
        if waiting:
            slurm.call(["scancel", "--state=PENDING", *waiting], "cancelling the waiting jobs")
            for job in waiting:
                cancelled.append(by_id[job])
                write(f"{by_id[job].stage}: job {job} was waiting; cancelled")
        running = [task for task in slurm.tasks(names) if task.active and task.state != "COMPLETING"]
        for task in running:
            stage, job = by_id[task.job].stage, task.job if task.index is None else f"{task.job}_{task.index}"
            if task.state == "RUNNING":
                slurm.call(["scancel", "--batch", "--signal=TERM", job], "telling a job to save and end")
                write(f"{stage}: job {job} saves and ends; a plain `scancel {job}` would not wait for that")
            elif task.job not in waiting or task.state != "PENDING":
                slurm.call(["scancel", job], "cancelling a job")
                write(f"{stage}: job {job} ({task.state}) cancelled")
            cancelled.append(by_id[task.job])
    finally:
        if cancelled:
            _record(folder, cancelled, write)
    if not cancelled:
        write(f"no job of {folder} is waiting or running")
    return 0


def _record(folder: Path, cancelled: Sequence[Job], write: Callable[[str], None]) -> None:
    """Note which jobs were cancelled; a warning where that is impossible, as on a full disk."""
    try:
        with run_lock(folder / FOLDER, _SUBMISSION_SECONDS):
            note_cancelled(folder, cancelled, datetime.now(UTC).isoformat(timespec="seconds"))
    except (MinimaError, OSError) as error:
        write(
            f"warning: {first_line(error)}, so it is not recorded that these jobs were cancelled: submit again only "
            "once they have ended"
        )

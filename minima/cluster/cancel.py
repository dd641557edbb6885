"""`minima cancel`: end a run's jobs; what is running saves first. No torch."""

from collections.abc import Callable

from minima.cluster import slurm
from minima.cluster.jobs import read_jobs
from minima.cluster.queued import lost_jobs
from minima.cluster.runs import open_run


def cancel(run: str, write: Callable[[str], None]) -> int:
    """Cancel a run's jobs: first those that wait, so that none of them starts, then those that run.

    A running job's script is told alone, tells its ranks, and cancels itself once they have saved: after a plain
    `scancel`, Slurm kills the ranks when its KillWait (30 s by default) is over.

    Args:
        run: its folder, or its recipe.
        write: takes text for a person.

    Returns:
        0.

    Raises:
        MinimaError: there is no such run, or Slurm refuses.
    """
    _, folder = open_run(run)
    jobs = [*read_jobs(folder), *lost_jobs(folder)]
    stages = {job.id: job.stage for job in jobs}
    names = [(job.id, job.name) for job in jobs]
    waiting = dict.fromkeys(task.job for task in reversed(slurm.tasks(names)) if task.state == "PENDING")
    if waiting:
        slurm.call(["scancel", "--state=PENDING", *waiting], "cancelling what waits")
        for job in waiting:
            write(f"{stages[job]}: job {job} was waiting; cancelled")
    running = [task for task in slurm.tasks(names) if task.active and task.state != "COMPLETING"]
    for task in running:
        job = task.job if task.index is None else f"{task.job}_{task.index}"
        if task.state == "RUNNING":
            slurm.call(["scancel", "--batch", "--signal=TERM", job], "telling a job to save and end")
            write(f"{stages[task.job]}: job {job} saves and ends; `scancel {job}` does not wait for that")
        elif task.job not in waiting or task.state != "PENDING":
            slurm.call(["scancel", job], "cancelling a job")
            write(f"{stages[task.job]}: job {job} ({task.state}) cancelled")
    if not waiting and not running:
        write(f"no job of {folder} waits or runs")
    return 0

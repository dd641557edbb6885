"""`minima cancel`: ends a run's jobs, letting running ones save first. No torch."""

from collections.abc import Callable

from minima.cluster import slurm
from minima.cluster.jobs import read_jobs
from minima.cluster.runs import open_run


def cancel(run: str, write: Callable[[str], None]) -> int:
    """Cancel a run's jobs: first the waiting ones, so that none of them starts, then the running ones.

    Only a running job's script gets the signal; it passes it on to its ranks, and cancels the job once they have saved.
    After a plain `scancel`, Slurm would kill the ranks after its KillWait (30 s by default).

    Args:
        run: its folder, or its recipe.
        write: receives text for the user.

    Returns:
        0.

    Raises:
        MinimaError: there is no such run, or Slurm refuses.
    """
    _, folder = open_run(run)
    jobs = read_jobs(folder)
    stages = {job.id: job.stage for job in jobs}
    names = [(job.id, job.name) for job in jobs]
    waiting = dict.fromkeys(task.job for task in reversed(slurm.tasks(names)) if task.state == "PENDING")
    if waiting:
        slurm.call(["scancel", "--state=PENDING", *waiting], "cancelling the waiting jobs")
        for job in waiting:
            write(f"{stages[job]}: job {job} was waiting; cancelled")
    running = [task for task in slurm.tasks(names) if task.active and task.state != "COMPLETING"]
    for task in running:
        job = task.job if task.index is None else f"{task.job}_{task.index}"
        if task.state == "RUNNING":
            slurm.call(["scancel", "--batch", "--signal=TERM", job], "telling a job to save and end")
            write(f"{stages[task.job]}: job {job} saves and ends; a plain `scancel {job}` would not wait for that")
        elif task.job not in waiting or task.state != "PENDING":
            slurm.call(["scancel", job], "cancelling a job")
            write(f"{stages[task.job]}: job {job} ({task.state}) cancelled")
    if not waiting and not running:
        write(f"no job of {folder} is waiting or running")
    return 0

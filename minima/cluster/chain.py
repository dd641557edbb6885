"""Handing scripts to Slurm one after another, and what of a run it has already. No torch."""

import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from minima.cluster import slurm
from minima.cluster.records import Job, add_job, read_jobs
from minima.cluster.render import Place, Script, quoted
from minima.errors import ClusterError


def queued_tasks(run_folder: Path, dry_run: bool, write: Callable[[str], None]) -> list[tuple[Job, slurm.Task]]:
    """The run's jobs that wait or run, each with every one of its tasks that does.

    Args:
        run_folder: with the records of jobs.
        dry_run: do without where Slurm does not answer.
        write: takes a warning.

    Raises:
        ClusterError: Slurm does not answer, and a job might be submitted twice.
    """
    jobs = {job.id: job for job in read_jobs(run_folder)}
    if not jobs or (dry_run and not slurm.is_here()):
        return []
    try:
        found = slurm.tasks([(job.id, job.name) for job in jobs.values()])
    except ClusterError as error:
        if not dry_run:
            raise
        write(f"warning: earlier jobs are not looked at: {error.what}")
        return []
    return [(jobs[task.job], task) for task in found if task.active]


def submit_chain(
    scripts: Sequence[Script], after: Sequence[str], place: Place, dry_run: bool, write: Callable[[str], None]
) -> None:
    """Submit jobs, each after the one before it.

    Args:
        scripts: in order.
        after: ids of jobs that the first waits for.
        place: where scripts and records lie.
        dry_run: print scripts and commands instead.
        write: takes text for a person.
    """
    before = list(after)
    for script in scripts:
        command = script.command(before)
        if dry_run:
            write(f"==> {script.path}\n{script.text}\n==> {quoted(command)}\n")
            before = [f"ID_OF_{script.name}"]
            continue
        job = _submit(script, command, before, place)
        asked = script.resources
        shape = (
            f"{asked.ranks} rank{'s' * (asked.ranks > 1)} on {asked.nodes or 1} node{'s' * ((asked.nodes or 1) > 1)}"
        )
        waits = f", after {', '.join(before)}" if before else ""
        write(f"{script.stage}: job {job.id}{'' if script.role == 'stage' else f' ({script.role})'}, {shape}{waits}")
        before = [job.id]


def _submit(script: Script, command: Sequence[str], after: Sequence[str], place: Place) -> Job:
    place.logs.mkdir(parents=True, exist_ok=True)  # Slurm makes no folder for a log; the job would fail unheard
    write_file(script.path, script.text)
    printed = slurm.call(command, f"handed the job of stage {script.stage}")
    identifier = printed.strip().splitlines()[-1].split(";")[0] if printed.strip() else ""
    if not identifier.isdigit():
        raise ClusterError(
            f"sbatch prints {printed!r}, handed the job of stage {script.stage}",
            "without the job's id nothing can wait for it",
            "look for it with squeue and cancel it; a wrapper of sbatch may not pass --parsable on",
        )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    cells = {str(index): name for index, name in enumerate(script.cells)}
    job = Job(
        id=identifier,
        name=script.name,
        stage=script.stage,
        role=script.role,
        ranks=script.resources.ranks,
        after=list(after),
        submitted=now,
        cells=cells,
        stages=list(script.stages),
    )
    add_job(place.run_folder, job)
    return job


def write_file(path: Path, text: str) -> None:
    """Write a file so that it is there whole or as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)

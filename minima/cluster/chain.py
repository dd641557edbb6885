"""Submitting a chain of job scripts to Slurm. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from minima.cluster import slurm
from minima.cluster.jobs import Job, add_job, begin_submission
from minima.cluster.queued import adopt_lost, ending_jobs
from minima.cluster.render import Place, Script, quoted
from minima.disk import write_whole
from minima.errors import ClusterError


def submit_chain(
    scripts: Sequence[Script],
    queued: Sequence[Job],
    place: Place,
    dry_run: bool,
    write: Callable[[str], None],
    order: Sequence[str] = (),
) -> None:
    """Submit jobs that each depend on the one before it, and on the jobs already queued.

    Queued jobs of earlier stages must succeed; those of later stages, and cancelled ones that are still saving, only
    have to end, because only one job at a time may write into a run's folder.

    Args:
        dry_run: print scripts and commands instead.
        order: names of all stages in order; needed if any jobs are queued.
    """
    left, before = list(queued), list[str]()
    ending = ending_jobs(place.run_folder, dry_run) if scripts else []
    for script in scripts:
        own = order.index(script.stage) if queued else 0
        earlier = [job.id for job in left if job.stage in order[:own]]
        left = [job for job in left if job.id not in earlier]
        later = [*(job.id for job in left), *ending] if script is scripts[0] else []  # the others wait for the first
        before = [*earlier, *before]
        command = script.command(before, later)
        if dry_run:
            write(f"# ==> {_one_line(str(script.path))}\n{script.text}\n# ==> {_one_line(quoted(command))}\n")
            before = [f"ID_OF_{script.name}"]
            continue
        job = _submit(script, command, before, place, write)
        asked = script.resources
        shape = (
            f"{asked.ranks} rank{'s' * (asked.ranks > 1)} on {asked.nodes or 1} node{'s' * ((asked.nodes or 1) > 1)}"
        )
        waits = f", after {', '.join([*before, *later])}" if before or later else ""
        write(f"{script.stage}: job {job.id}{'' if script.role == 'stage' else f' ({script.role})'}, {shape}{waits}")
        before = [job.id]


def _one_line(text: str) -> str:
    """The text escaped to fit into a one-line comment, so that the output of a dry run is a valid script."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _submit(
    script: Script, command: Sequence[str], after: Sequence[str], place: Place, write: Callable[[str], None]
) -> Job:
    place.logs.mkdir(parents=True, exist_ok=True)  # Slurm does not create log folders; the job would fail silently
    write_whole(script.path, script.text)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    cells = {str(index): name for index, name in enumerate(script.cells)}
    job = Job(
        id="",
        name=script.name,
        stage=script.stage,
        role=script.role,
        ranks=script.resources.ranks,
        after=list(after),
        submitted=now,
        cells=cells,
        stages=list(script.stages),
        recipe=str(script.recipe.relative_to(place.run_folder)) if script.overrides else "",
        overrides={name: list(changes) for name, changes in script.overrides.items()},
        asked=dict(script.asked),
    )
    begin_submission(place.run_folder, job, script.path)
    try:
        job = replace(job, id=_job_id(slurm.call(command, f"submitting the job of stage {script.stage}"), script.stage))
    except ClusterError as error:
        return _submitted_anyway(error, job, place, write)
    add_job(place.run_folder, job)
    return job


def _job_id(printed: str, stage: str) -> str:
    identifier = printed.strip().splitlines()[-1].split(";")[0] if printed.strip() else ""
    if not identifier.isdigit():
        raise ClusterError(
            f"sbatch printed {printed!r} when submitting the job of stage {stage}",
            "without the job's id no other job can depend on it",
            "find it with squeue and cancel it; perhaps a wrapper of sbatch does not pass --parsable on",
        )
    return identifier


def _submitted_anyway(error: ClusterError, job: Job, place: Place, write: Callable[[str], None]) -> Job:
    """The job, where Slurm has it although sbatch failed: under load, Slurm's answer can come too late for sbatch.

    Raises:
        ClusterError: Slurm does not have the job, or does not say whether it has.
    """
    if not slurm.is_here():
        raise error
    try:
        found = adopt_lost(place.run_folder, write)
    except ClusterError as silent:
        raise ClusterError(
            error.what,
            f"the job may have been submitted all the same, and that cannot be checked now: {silent.what}",
            f"look for it with `squeue --name={job.name}`; once squeue answers, submit again: if the job is there, it "
            "is recorded and not submitted twice",
        ) from None
    if not found:
        raise error
    return found[-1]

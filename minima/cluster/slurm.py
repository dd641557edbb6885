"""Runs Slurm's commands without a shell, and parses their machine-readable output."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minima.errors import ClusterError
from minima.launcher import submitting_environment

_TIMEOUT_SECONDS = 120  # slurmctld may be busy; its own MessageTimeout is 10 s by default, and commands retry
# States of a job that may still run: squeue(1), job state codes.
ACTIVE = frozenset(
    {
        "PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD",
        "RESIZING", "RESV_DEL_HOLD", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "STOPPED",
    }
)  # fmt: skip
_UNKNOWN = "Invalid job id"


@dataclass(frozen=True)
class Task:
    """A job, or one task of a job array, as Slurm shows it."""

    job: str  # its id; for a task, the array's
    index: int | None  # of the task in its array; None for a plain job
    state: str  # Slurm's name for it
    name: str  # of the job
    reason: str = ""  # why it is waiting, or why it ended

    @property
    def active(self) -> bool:
        """Whether it is waiting, running, or about to run."""
        return self.state in ACTIVE


def is_here() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("squeue") is not None


def call(command: Sequence[str], doing: str) -> str:
    """Run one of Slurm's commands and return its output.

    Args:
        doing: what the command is for, as a participle for error messages: `submitting a job`.

    Raises:
        ClusterError: the command is not installed, fails, or does not answer.
    """
    try:
        done = subprocess.run(
            command,
            env=submitting_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_SECONDS,
        )
    except FileNotFoundError:
        raise ClusterError(
            f"{command[0]} is not on this machine, needed for {doing}",
            "jobs are submitted with Slurm's own commands",
            "run this on a login node of the cluster; --dry-run shows the scripts anywhere",
        ) from None
    except subprocess.TimeoutExpired:
        raise ClusterError(
            f"{command[0]} did not answer within {_TIMEOUT_SECONDS} s when {doing}",
            "Slurm's controller is down or overloaded",
            "try again later; `scontrol ping` says whether it is up",
        ) from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise ClusterError(
            f"{command[0]} failed when {doing}: {said}",
            "Slurm did not do what was asked",
            "fix what it names: most often a partition, an account or a limit in the cluster file, or a job that "
            "belongs to another user",
        )
    return done.stdout


def tasks(jobs: Sequence[tuple[str, str]], ended: bool = False) -> list[Task]:
    """The tasks of some jobs that squeue lists; a job that it does not list ended some time ago.

    Args:
        jobs: ids and names. A job that reuses an old job's id has another name, and is left out.
        ended: include those that ended a short time ago.

    Raises:
        ClusterError: squeue fails.
    """
    if not jobs:
        return []
    command = ["squeue", "--noheader", "--array", f"--jobs={','.join(job for job, _ in jobs)}"]
    command += ["--format=%F|%K|%T|%j|%r", *(["--states=all"] if ended else [])]
    try:
        text = call(command, "listing the jobs of this run")
    except ClusterError as error:
        if _UNKNOWN in error.what:
            return []
        raise
    found, names = [], dict(jobs)
    for line in text.splitlines():
        fields = line.strip().split("|", 4)
        if len(fields) == 5 and names.get(fields[0]) == fields[3]:
            index = int(fields[1]) if fields[1].isdigit() else None
            found.append(Task(fields[0], index, fields[2].split()[0], fields[3], fields[4]))
    return found


def jobs_of_script(script: Path, name: str) -> list[str]:
    """Ids of the jobs that wait or run with this script, whoever submitted them, oldest first.

    Args:
        script: absolute.
        name: of the jobs: letters, digits, `_`, `.` and `-`.

    Raises:
        ClusterError: squeue fails.
    """
    command = ["squeue", "--noheader", f"--name={name}", "--format=%F|%T|%j|%o"]
    rows = [line.strip().split("|", 3) for line in call(command, f"listing the jobs of {script}").splitlines()]
    own = [row for row in rows if len(row) == 4 and row[1] in ACTIVE and row[2] == name]
    return sorted({row[0] for row in own if os.path.realpath(row[3]) == os.path.realpath(script)}, key=int)


def accounted(jobs: Sequence[tuple[str, str]]) -> list[Task]:
    """The tasks of jobs that have left the queue, from Slurm's accounting, or else from its controller.

    Args:
        jobs: ids and names, as for `tasks`.
    """
    if not jobs:
        return []
    found, names = [], dict(jobs)
    command = ["sacct", "--noheader", "--allocations", "--parsable2", "--array"]
    command += [f"--jobs={','.join(job for job, _ in jobs)}", "--format=JobID,State,JobName"]
    try:
        text = call(command, "listing jobs that ended")
    except ClusterError:  # no accounting on this cluster
        text = ""
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) == 3:
            job, _, index = fields[0].partition("_")
            if names.get(job) == fields[2]:
                found.append(Task(job, int(index) if index.isdigit() else None, fields[1].split()[0], fields[2]))
    for job, name in jobs:
        if not any(task.job == job for task in found):
            own = [fields for fields in shown("job", job) if fields.get("JobName") == name and "JobState" in fields]
            found += [Task(job, None, fields["JobState"], name, fields.get("Reason", "")) for fields in own]
    return found


def restarts(job: str) -> int:
    """How often Slurm has restarted a job; 0 if it does not say."""
    counts = [fields.get("Restarts", "") for fields in shown("job", job)]
    return max((int(count) for count in counts if count.isdigit()), default=0)


def shown(kind: str, name: str) -> list[dict[str, str]]:
    """The fields that scontrol shows of a job's tasks or of a partition; empty if it does not answer."""
    try:
        lines = call(["scontrol", "show", kind, "--oneliner", name], f"looking up the {kind} {name}").splitlines()
    except ClusterError:
        return []
    return [dict(part.split("=", 1) for part in line.split() if "=" in part) for line in lines]

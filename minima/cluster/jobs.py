"""The record of a run's jobs: `RUN/cluster/jobs.json`, rewritten with each submitted job."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from minima.disk import write_json
from minima.errors import ClusterError

FOLDER, FILE = "cluster", "jobs.json"


@dataclass(frozen=True)
class Job:
    """One submitted job."""

    id: str
    name: str
    stage: str  # the stage that it runs; `cells` for a grid
    # `stage`, `parts` (an array, each task one part of the data), `merge` (of those parts) or `cells` (an array, each
    # task one cell of a grid)
    role: str
    ranks: int  # processes on all nodes
    after: list[str] = field(default_factory=list)  # ids of the jobs that must succeed before it
    submitted: str = ""  # time of submission in ISO 8601
    cells: dict[str, str] = field(default_factory=dict)  # names of a grid's cells by the index of their task
    stages: list[str] = field(default_factory=list)  # the stages that each cell runs; empty for all
    recipe: str = ""  # path of the recipe's copy that it reads, relative to the run's folder
    # of that recipe, by the name of the stage, or of the cell in a grid
    overrides: dict[str, list[str]] = field(default_factory=dict)
    # its settings from the cluster file and the flags; empty for a job of an earlier version
    asked: dict[str, Any] = field(default_factory=dict)
    cancelled: str = ""  # time at which `minima cancel` ended it, in ISO 8601; it may still be saving. Empty otherwise


def read_jobs(run_folder: Path) -> list[Job]:
    """The jobs that were submitted for a run, oldest first; empty if it was never submitted.

    Raises:
        ClusterError: the record cannot be read.
    """
    return _read(run_folder)[0]


def read_submission(run_folder: Path) -> tuple[Job, Path] | None:
    """The job, without an id, that was being submitted when sbatch failed or `minima submit` ended, and its script.

    Raises:
        ClusterError: the record cannot be read.
    """
    return _read(run_folder)[1]


def begin_submission(run_folder: Path, job: Job, script: Path) -> None:
    """Record a job before it goes to sbatch, whose answer may be lost. `add_job` ends this."""
    _write(run_folder, read_jobs(run_folder), {"script": str(script), "job": asdict(job)})


def add_job(run_folder: Path, job: Job) -> None:
    """Add a job to the record, atomically."""
    _write(run_folder, [*read_jobs(run_folder), job])


def note_cancelled(run_folder: Path, cancelled: Sequence[Job], when: str) -> None:
    """Record that jobs were cancelled, so that nothing counts on them though they may still be saving.

    Args:
        cancelled: the jobs; one that is not recorded yet is now.
        when: in ISO 8601.
    """
    jobs, submission = _read(run_folder)
    marked = {job.id: replace(job, cancelled=when) for job in cancelled}
    known = {job.id: marked.get(job.id, job) for job in jobs}
    begun = {"script": str(submission[1]), "job": asdict(submission[0])} if submission else None
    _write(run_folder, list((known | marked).values()), begun)


def _read(run_folder: Path) -> tuple[list[Job], tuple[Job, Path] | None]:
    path = run_folder / FOLDER / FILE
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        begun = content.get("submitting")
        submission = (Job(**begun["job"]), Path(begun["script"])) if begun else None
        return [Job(**entry) for entry in content["jobs"]], submission
    except FileNotFoundError:
        return [], None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ClusterError(
            f"{path} cannot be read ({error})",
            "it records which jobs this run has; a second job for a stage would interfere with the first",
            "find the jobs of this run with squeue, end them with scancel, and move the file away",
        ) from None


def _write(run_folder: Path, jobs: list[Job], submitting: dict[str, Any] | None = None) -> None:
    (run_folder / FOLDER).mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"jobs": [asdict(job) for job in jobs]}
    write_json(run_folder / FOLDER / FILE, content | ({"submitting": submitting} if submitting else {}))

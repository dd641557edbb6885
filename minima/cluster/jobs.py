"""Which jobs a run has: `RUN/cluster/jobs.json`, written anew with each job that is submitted."""

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
    """One job that was submitted.

    Attributes:
        id: Slurm's.
        name: Slurm's name for it.
        stage: that it runs; `cells` for a grid.
        role: `stage`, `parts` (an array, each task one part of the data), `merge` (of those) or `cells` (an array, each
            task one cell of a grid).
        ranks: processes over all nodes.
        after: ids of the jobs that have to succeed before it.
        submitted: when, in ISO 8601.
        cells: names of a grid's cells by the index of their task.
        stages: that each cell runs; all for none.
        recipe: the copy of the recipe that it reads, inside the run's folder.
        overrides: of that recipe, by the stage's name; of a grid, by the cell's.
        asked: what it took from the cluster file and the flags; of a job of an earlier version nothing.
        cancelled: when `minima cancel` ended it, in ISO 8601; it may still be saving. Empty for one that was not.
    """

    id: str
    name: str
    stage: str
    role: str
    ranks: int
    after: list[str] = field(default_factory=list)
    submitted: str = ""
    cells: dict[str, str] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)
    recipe: str = ""
    overrides: dict[str, list[str]] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)
    cancelled: str = ""


def read_jobs(run_folder: Path) -> list[Job]:
    """The jobs that were submitted for a run, oldest first; none when it was never submitted.

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
    """Keep one more job; the file is there whole or as it was."""
    _write(run_folder, [*read_jobs(run_folder), job])


def note_cancelled(run_folder: Path, cancelled: Sequence[Job], when: str) -> None:
    """Record that jobs were cancelled, so that nothing counts on them though they may still be saving.

    Args:
        run_folder: of the run.
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
            "it says which jobs of this run wait or run; a second job for a stage would be in the first one's way",
            "look with squeue for jobs of this run, end them with scancel, and move the file away",
        ) from None


def _write(run_folder: Path, jobs: list[Job], submitting: dict[str, Any] | None = None) -> None:
    (run_folder / FOLDER).mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"jobs": [asdict(job) for job in jobs]}
    write_json(run_folder / FOLDER / FILE, content | ({"submitting": submitting} if submitting else {}))

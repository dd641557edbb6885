"""The record of a run's jobs: `RUN/cluster/jobs.json`, rewritten with each submitted job."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minima.disk import write_json
from minima.errors import ClusterError

FOLDER, FILE = "cluster", "jobs.json"


@dataclass(frozen=True)
class Job:
    """One submitted job.

    Attributes:
        id: Slurm's job id.
        name: Slurm's job name.
        stage: the stage that it runs; `cells` for a grid.
        role: `stage`, `parts` (an array, each task one part of the data), `merge` (of those parts) or `cells` (an
            array, each task one cell of a grid).
        ranks: processes on all nodes.
        after: ids of the jobs that must succeed before it.
        submitted: time of submission in ISO 8601.
        cells: names of a grid's cells by the index of their task.
        stages: the stages that each cell runs; empty for all.
        recipe: path of the recipe's copy that it reads, relative to the run's folder.
        overrides: of that recipe, by the name of the stage, or of the cell in a grid.
        asked: its settings from the cluster file and the flags; empty for a job of an earlier version.
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


def read_jobs(run_folder: Path) -> list[Job]:
    """The jobs that were submitted for a run, oldest first; empty if it was never submitted.

    Raises:
        ClusterError: the record cannot be read.
    """
    path = run_folder / FOLDER / FILE
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        return [Job(**entry) for entry in content["jobs"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ClusterError(
            f"{path} cannot be read ({error})",
            "it records which jobs this run has; a second job for a stage would interfere with the first",
            "find the jobs of this run with squeue, end them with scancel, and move the file away",
        ) from None


def add_job(run_folder: Path, job: Job) -> None:
    """Add a job to the record, atomically."""
    jobs = [*read_jobs(run_folder), job]
    (run_folder / FOLDER).mkdir(parents=True, exist_ok=True)
    write_json(run_folder / FOLDER / FILE, {"jobs": [asdict(each) for each in jobs]})

"""A chain of jobs whose submission is cut short: sbatch's answer is lost, or `minima submit` is killed."""

import json
import os
from pathlib import Path

import pytest
import yaml

from minima.cluster.cancel import cancel
from minima.cluster.jobs import read_jobs
from minima.cluster.status import status
from minima.errors import ClusterError
from tests.unit.cluster.test_submit import RUN, answer_queue, send

OWN_JOBS = f"squeue --noheader --user={os.getuid()}"
JOBS_FILE = RUN / "cluster" / "jobs.json"


def answer_own(slurm, *jobs: str) -> None:
    """What squeue shows of the user's jobs: `ID STATE NAME SCRIPT` of each."""
    slurm.answer(**{OWN_JOBS: "\n".join(job.replace(" ", "|", 3) for job in jobs)})


def script(project: Path, stage: str) -> Path:
    return project / RUN / "cluster" / f"{stage}.sbatch"


def test_a_job_that_slurm_has_though_sbatch_failed_is_part_of_the_chain(slurm, project):
    slurm.answer(sbatch="--lost 2")
    answer_own(slurm, f"7 RUNNING test.base {project / 'runs/other/cluster/base.sbatch'}",
               f"9 RUNNING test.out {script(project, 'base')}",
               f"102 PENDING test.base {script(project, 'base')}")  # fmt: skip
    said = send()
    assert [(job.id, job.stage) for job in read_jobs(RUN)] == [("101", "corpus"), ("102", "base"), ("103", "out")]
    assert "--dependency=afterok:102" in slurm.calls("sbatch")[2]
    assert "base: job 102 was submitted, although sbatch did not get to say so" in said
    assert "submitting" not in json.loads(JOBS_FILE.read_text())


def test_a_job_that_cannot_be_looked_up_is_recorded_by_the_next_submission(slurm, project):
    slurm.answer(sbatch="--lost 1", **{OWN_JOBS: "error Unable to contact slurm controller"})
    with pytest.raises(ClusterError, match=r"(?s)Socket timed out.*may have been submitted.*Unable to contact.*--me"):
        send()
    assert read_jobs(RUN) == []
    with pytest.raises(ClusterError, match="Unable to contact"):
        send()
    assert len(slurm.calls("sbatch")) == 1, "a second job would find the folder in use"
    answer_own(slurm, f"101 RUNNING test.corpus {script(project, 'corpus')}")
    answer_queue(slurm, "101 RUNNING corpus None")
    assert "corpus: job 101 is in the queue" in send()
    assert [Path(call[-1]).stem for call in slurm.calls("sbatch")] == ["corpus", "base", "out"]
    assert "--dependency=afterok:101" in slurm.calls("sbatch")[1]
    with pytest.raises(ClusterError, match="steps 100, not 7"):  # what was lost is known as what it was submitted with
        answer_queue(slurm, "101 RUNNING corpus None", "102 PENDING base Dependency")
        send("stages.base.steps=7")


def test_a_job_that_slurm_never_got_is_submitted_again(slurm, project):
    slurm.answer(sbatch="--lost 1")
    with pytest.raises(ClusterError, match="Socket timed out"):
        send()
    send()
    assert [job.stage for job in read_jobs(RUN)] == ["corpus", "base", "out"]


def test_a_submission_that_was_killed_before_it_recorded_a_job(slurm, project, monkeypatch):
    def killed(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("minima.cluster.chain.add_job", killed)
        send()
    answer_own(slurm, f"101 RUNNING test.corpus {script(project, 'corpus')}")
    answer_queue(slurm, "101 RUNNING corpus None")
    said: list[str] = []
    status(str(RUN), said.append)
    assert "101  RUNNING" in said[0]
    cancel(str(RUN), said.append)
    assert slurm.calls("scancel") == [["--batch", "--signal=TERM", "101"]]


def test_the_comments_of_jobs_are_the_cluster_files(slurm, project):
    options = {"sbatch_options": ["--comment=project-7"]}
    Path("cluster.yaml").write_text(yaml.safe_dump({"stages": {"adapt": options}}))
    send()
    comments = [[word for word in call if word.startswith("--comment")] for call in slurm.calls("sbatch")]
    assert comments == [[], ["--comment=project-7"], []]


def test_the_record_of_an_earlier_version(slurm, project):
    send()
    content = json.loads(JOBS_FILE.read_text())
    for job in content["jobs"]:
        del job["cancelled"]
    JOBS_FILE.write_text(json.dumps(content))
    answer_queue(slurm, "101 RUNNING corpus None", "102 PENDING base Dependency", "103 PENDING out Dependency")
    assert "nothing to submit" in send()

"""A chain whose submission is cut short (sbatch's answer is lost, `minima submit` is killed), or that was cancelled."""

import json
from pathlib import Path

import pytest
import yaml

from minima.cluster import cancel as cluster_cancel
from minima.cluster.cancel import cancel
from minima.cluster.jobs import read_jobs
from minima.cluster.status import status
from minima.errors import ClusterError
from minima.stages.lock import run_lock
from tests.unit.cluster.conftest import finish
from tests.unit.cluster.test_status_cancel import send_cells
from tests.unit.cluster.test_submit import RUN, answer_queue, send

JOBS_FILE = RUN / "cluster" / "jobs.json"


def named(stage: str) -> str:
    return f"squeue --noheader --name=test.{stage}"


def answer_named(slurm, stage: str, *jobs: str) -> None:
    """What squeue shows of the jobs of that name: `ID STATE SCRIPT` of each."""
    rows = [job.split(" ", 2) for job in jobs]
    slurm.answer(**{named(stage): "\n".join(f"{job}|{state}|test.{stage}|{path}" for job, state, path in rows)})


def script(project: Path, stage: str) -> Path:
    return project / RUN / "cluster" / f"{stage}.sbatch"


def test_a_job_that_slurm_has_though_sbatch_failed_is_part_of_the_chain(slurm, project):
    slurm.answer(sbatch="--lost 2")
    answer_named(slurm, "base", f"7 RUNNING {project / 'runs/other/cluster/base.sbatch'}",
                 f"9 FAILED {script(project, 'base')}", f"102 PENDING {script(project, 'base')}")  # fmt: skip
    said = send()
    assert [(job.id, job.stage) for job in read_jobs(RUN)] == [("101", "corpus"), ("102", "base"), ("103", "out")]
    assert "--dependency=afterok:102" in slurm.calls("sbatch")[2]
    assert "base: job 102 was submitted, although sbatch did not get to say so" in said
    assert "submitting" not in json.loads(JOBS_FILE.read_text())


def test_a_job_that_cannot_be_looked_up_is_recorded_by_the_next_submission(slurm, project):
    slurm.answer(sbatch="--lost 1", **{named("corpus"): "error Unable to contact slurm controller"})
    with pytest.raises(
        ClusterError, match=r"(?s)Socket timed out.*may have been submitted.*Unable to contact.*--name=test.corpus"
    ):
        send()
    assert read_jobs(RUN) == []
    with pytest.raises(ClusterError, match="Unable to contact"):
        send()
    assert len(slurm.calls("sbatch")) == 1, "a second job would find the folder in use"
    answer_named(slurm, "corpus", f"101 RUNNING {script(project, 'corpus')}")
    answer_queue(slurm, "101 RUNNING corpus None")
    assert "corpus: job 101 is in the queue" in send()
    assert [Path(call[-1]).stem for call in slurm.calls("sbatch")] == ["corpus", "base", "out"]
    assert "--dependency=afterok:101" in slurm.calls("sbatch")[1]
    with pytest.raises(ClusterError, match="sequence_length 32, not 16"):  # the record says what the lost job reads
        send("stages.corpus.sequence_length=16")


def test_a_job_that_slurm_never_got_is_submitted_again(slurm, project):
    slurm.answer(sbatch="--lost 1")
    with pytest.raises(ClusterError, match="Socket timed out"):
        send()
    send()
    assert [job.stage for job in read_jobs(RUN)] == ["corpus", "base", "out"]


def test_a_submission_that_was_killed_before_it_recorded_a_job(slurm, project, monkeypatch):
    def killed(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr("minima.cluster.chain.add_job", killed)
    with pytest.raises(KeyboardInterrupt):
        send()
    answer_named(slurm, "corpus", f"101 RUNNING {script(project, 'corpus')}")
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
    assert "submitting" not in content
    for job in content["jobs"]:
        del job["cancelled"]
    JOBS_FILE.write_text(json.dumps(content))
    answer_queue(slurm, "101 RUNNING corpus None", "102 PENDING base Dependency", "103 PENDING out Dependency")
    assert "nothing to submit" in send()


def end(slurm) -> str:
    said: list[str] = []
    cancel(str(RUN), said.append)
    return "\n".join(said)


def test_what_is_submitted_after_a_cancel_waits_for_the_job_that_still_saves(slurm, project):
    send()
    finish(RUN, "corpus")
    queue = ["101 COMPLETED corpus None", "102 RUNNING base None"]
    answer_queue(slurm, *queue, "103 PENDING out Dependency")
    end(slurm)
    assert [bool(job.cancelled) for job in read_jobs(RUN)] == [False, True, True]
    answer_queue(slurm, *queue, "103 CANCELLED out None")
    said = send()
    assert "base: job 102 was cancelled and has not ended yet" in said and "in the queue" not in said
    first, second = slurm.calls("sbatch")[3:]
    assert "--dependency=afterany:102" in first and "--dependency=afterok:104" in second
    answer_queue(slurm, *queue, "104 PENDING base Dependency", "105 PENDING out Dependency")
    assert "nothing to submit" in send()
    assert len(slurm.calls("sbatch")) == 5


def test_a_stage_that_ended_well_before_the_signal_of_a_cancel_dooms_nothing(slurm, project):
    send()
    answer_queue(slurm, "101 RUNNING corpus None")
    end(slurm)
    finish(RUN, "corpus")
    answer_queue(slurm, "101 COMPLETED corpus None", "102 RUNNING base None", "103 PENDING out Dependency")
    assert "nothing to submit" in send()


def test_a_changed_recipe_can_be_submitted_once_the_jobs_are_cancelled(slurm, project):
    send()
    answer_queue(slurm, "101 RUNNING corpus None", "102 PENDING base Dependency", "103 PENDING out Dependency")
    end(slurm)
    answer_queue(slurm, "101 RUNNING corpus None")
    send("stages.base.steps=7")
    assert "--dependency=afterany:101" in slurm.calls("sbatch")[3]


def test_cells_wait_for_cancelled_ones_in_the_same_folders(slurm, project):
    send_cells("a", "b")
    slurm.answer(squeue="101|0|RUNNING|test.cells|None\n101|1|COMPLETED|test.cells|None")
    end(slurm)
    send_cells("a", "b")
    assert "--dependency=afterany:101" in slurm.calls("sbatch")[1]


def test_a_cancel_that_cannot_be_recorded_says_so(slurm, project, monkeypatch):
    monkeypatch.setattr(cluster_cancel, "_SUBMISSION_SECONDS", 0.0)
    send()
    answer_queue(slurm, "102 RUNNING base None")
    with run_lock(RUN / "cluster"):
        said = end(slurm)
    assert slurm.calls("scancel") == [["--batch", "--signal=TERM", "102"]]
    assert "warning: runs/test/cluster is in use by" in said and "submit again only once they have ended" in said

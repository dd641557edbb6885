"""A small recipe with stages of every kind that uses ranks, as jobs on two nodes, and all that a cluster does to it.

The student meets eight faults; `undisturbed` is the same stage with none. At the end both hold the same bits.
"""

import os
import signal
import time
from datetime import datetime, timedelta

import pytest

from tests.cluster.chain import STEPS, Chain

pytestmark = pytest.mark.ranks

STAGES = ("corpus", "teacher", "pruned", "student", "undisturbed", "quality", "out")


class Faults:
    """Does to the student's job what clusters do, one fault after the other, and keeps what was seen."""

    def __init__(self, chain: Chain) -> None:
        self.chain, self.slurm, self.seen = chain, chain.slurm, {}
        self.next_step = 5  # the student's step at which the next fault comes

    def begin(self) -> str:
        """Wait until the student has come far enough for the next fault; gives its job."""
        job = self.chain.job("student")
        step = self.chain.wait_step("student", self.next_step)
        self.next_step = step + 12
        assert step < STEPS - 10, "the student is too fast for these faults: raise STEPS"
        return job

    def end(self, name: str, job: str, restarts: int | None) -> None:
        """Keep what a fault left; wait for the job's next start, where there is one."""
        if restarts is not None:
            self.chain.wait(
                f"start {restarts} of job {job} after {name}",
                lambda: self.slurm.job(job)["Restarts"] == str(restarts) and self.slurm.state(job) == "RUNNING",
            )
        saved = self.chain.marker("student")["step"]
        self.seen[name] = {"saved": saved, "logged": self.chain.step("student"), "state": self.slurm.state(job)}
        self.next_step = max(self.next_step, saved + 8)

    def time_limit(self, restarts: int) -> None:
        """Its time is nearly up. Slurm looks every 30 s; the ranks stand still meanwhile."""
        job = self.begin()
        self.slurm.freeze(job)
        ends = datetime.now() + timedelta(seconds=70)  # asked for 45 s ahead, and Slurm comes up to 30 s early
        self.slurm.call("scontrol", "update", f"JobId={job}", f"EndTime={ends:%Y-%m-%dT%H:%M:%S}")
        self.chain.wait("signal ahead of the time limit", lambda: "told to leave" in self.chain.logs("student"))
        self.slurm.thaw(job)
        self.chain.wait("requeue", lambda: self.slurm.state(job) != "RUNNING")
        self.slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=60")
        self.end("time limit", job, restarts)

    def requeue(self, restarts: int) -> None:
        """An administrator requeues it."""
        job = self.begin()
        self.slurm.call("scontrol", "requeue", job)
        self.end("requeue", job, restarts)

    def preemption(self, restarts: int) -> None:
        """A job of a partition that goes before wants all nodes."""
        job = self.begin()
        self.slurm.freeze(job)  # Slurm's SIGCONT wakes the ranks
        urgent = self.slurm.call(
            "sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null",
            "--wrap=sleep 1",
        ).strip()  # fmt: skip
        self.chain.wait("end of the urgent job", lambda: self.slurm.state(urgent) == "COMPLETED")
        self.end("preemption", job, restarts)

    def lost_node(self, restarts: int) -> None:
        """Node n2 does not answer any more, and comes back later."""
        job = self.begin()
        self.slurm.freeze(job)
        self.slurm.stop_node("n2")
        try:
            self.chain.wait("loss of n2", lambda: "down" in self.slurm.nodes()["n2"])
            self.chain.wait("end of the job's start", lambda: self.slurm.state(job) != "RUNNING")
            self.slurm.thaw(job)
            self.chain.wait("end of all ranks", lambda: not self.slurm.ranks(job))
        finally:
            self.slurm.start_node("n2")
        self.end("lost node", job, restarts)

    def node_that_starts_anew(self, restarts: int) -> None:
        """All that runs on n2 is gone at once, and it is back before Slurm has missed it."""
        job = self.begin()
        self.slurm.crash_node("n2", rank=self.slurm.ranks(job)[1])
        self.slurm.start_node("n2")
        self.end("crashed node", job, restarts)

    def killed_rank(self) -> None:
        """One rank is killed: its job fails, and those that wait for it go with it."""
        job = self.begin()
        os.kill(self.slurm.ranks(job)[1], signal.SIGKILL)
        self.chain.wait("failure of the job", lambda: self.slurm.state(job) == "FAILED")
        self.end("killed rank", job, None)
        self.seen["status after the kill"] = self.chain.minima("status", str(self.chain.run_folder), code=1)
        waiting = [self.chain.job(stage) for stage in ("undisturbed", "quality", "out")]
        self.chain.wait("end of the chain", lambda: all(self.slurm.state(job) == "CANCELLED" for job in waiting))
        self.seen["submitted after the kill"] = self.chain.submit()

    def cancelled(self) -> None:
        """The user cancels it: it saves, stays cancelled, and goes on when it is submitted again."""
        job = self.begin()
        self.seen["cancel"] = self.chain.minima("cancel", str(self.chain.run_folder))
        self.chain.wait("end of the job", lambda: self.slurm.state(job) == "CANCELLED")
        self.end("cancelled", job, None)
        time.sleep(8)  # a requeued job would wait 6 s
        self.seen["cancelled"]["state later"] = self.slurm.state(job)
        self.seen["submitted after the cancel"] = self.chain.submit()

    def scancelled(self) -> None:
        """The user cancels it with Slurm's own command, which kills the ranks when KillWait is over."""
        job = self.begin()
        self.slurm.call("scancel", job)
        self.chain.wait("end of the job", lambda: self.slurm.state(job) == "CANCELLED" and not self.slurm.ranks(job))
        self.end("scancel", job, None)
        self.seen["submitted after the scancel"] = self.chain.submit()


@pytest.fixture(scope="module")
def chain(slurm, tmp_path_factory):
    """The chain after all faults and its end."""
    chain = Chain(slurm, tmp_path_factory.mktemp("cluster"))
    faults = Faults(chain)
    chain.seen = faults.seen
    chain.seen["submitted"] = chain.submit()
    chain.seen["submitted twice"] = chain.submit()
    try:
        faults.time_limit(restarts=1)
        faults.requeue(restarts=2)
        faults.preemption(restarts=3)
        faults.lost_node(restarts=4)
        faults.node_that_starts_anew(restarts=5)
        faults.killed_rank()
        faults.cancelled()
        faults.scancelled()
        chain.wait("end of the chain", lambda: slurm.state(chain.job("out")) not in ("PENDING", "RUNNING"), 400)
        yield chain
    finally:
        for job in chain.jobs():
            slurm.call("scancel", "--quiet", job["id"])


def test_every_stage_is_finished(chain):
    assert [stage for stage in STAGES if not chain.finished(stage)] == [], chain.described()
    assert {chain.slurm.state(chain.job(stage)) for stage in STAGES} == {"COMPLETED"}
    assert not (chain.folder / "hit").exists()


def test_the_corpus_was_built_by_an_array_of_jobs_and_merged(chain):
    jobs = [job for job in chain.jobs() if job["stage"] == "corpus"]
    assert [job["role"] for job in jobs] == ["parts", "merge"]
    assert all(f"corpus-{jobs[0]['id']}_{index}-rank0.log" in chain.logs("corpus") for index in (0, 1))


def test_after_eight_faults_the_student_holds_the_bits_of_an_undisturbed_run(chain):
    hashes = [chain.marker(stage, STEPS)["sha256"] for stage in ("student", "undisturbed")]
    assert {name for name in hashes[0] if "weights" in name} and {name for name in hashes[0] if "exp_avg" in name}
    assert hashes[0] == hashes[1]
    losses = [
        {record["step"]: record["loss"] for record in chain.records(stage) if "loss" in record}
        for stage in ("student", "undisturbed")
    ]
    assert losses[0] == losses[1] and sorted(losses[0]) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("fault", ["time limit", "requeue", "preemption", "lost node", "cancelled", "scancel"])
def test_what_is_told_to_leave_loses_no_step(chain, fault):
    assert chain.seen[fault]["saved"] == chain.seen[fault]["logged"]


@pytest.mark.parametrize("fault", ["crashed node", "killed rank"])
def test_what_is_gone_at_once_loses_the_steps_since_the_last_checkpoint_alone(chain, fault):
    assert 0 <= chain.seen[fault]["logged"] - chain.seen[fault]["saved"] <= 20 + 1


def test_a_node_that_slurm_does_not_miss_costs_no_submission(chain):
    assert chain.seen["crashed node"]["state"] == "RUNNING"
    assert "node n2 was lost or drained meanwhile" in chain.logs("student")


def test_a_killed_rank_fails_its_job_and_says_so(chain):
    assert chain.seen["killed rank"]["state"] == "FAILED"
    status = chain.seen["status after the kill"]
    assert "student failed:" in status and "task 1: Killed" in status and "the last lines of rank 1:" in status


def test_a_cancelled_job_stays_cancelled(chain):
    assert chain.seen["cancelled"]["state later"] == "CANCELLED"
    assert "saves and ends" in chain.seen["cancel"] and chain.seen["cancel"].count("was waiting; cancelled") == 3


def test_submitted_again_only_what_is_missing_is_submitted(chain):
    assert chain.seen["submitted"].count(": job ") == len(STAGES) + 1
    twice = chain.seen["submitted twice"]
    assert "nothing to submit" in twice and twice.count("is in the queue") == len(STAGES)
    for again in ("submitted after the kill", "submitted after the cancel", "submitted after the scancel"):
        assert "pruned: finished" in chain.seen[again]
        assert [line.split(":")[0] for line in chain.seen[again].splitlines() if ": job " in line] == list(STAGES[3:])


def test_status_shows_a_finished_run(chain):
    printed = chain.minima("status", str(chain.run_folder))
    assert all(stage in printed for stage in STAGES) and f"{STEPS}" in printed

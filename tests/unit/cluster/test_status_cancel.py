"""What `minima status` says and `minima cancel` does."""

import json
import os
from pathlib import Path

import pytest
import yaml

from minima.cluster.cancel import cancel
from minima.cluster.progress import last_record
from minima.cluster.status import status
from minima.cluster.submit import submit
from minima.errors import ClusterError
from tests.unit.cluster.conftest import finish

RUN = Path("runs/test")


def send(names: list[str] | None = None, grid: Path | None = None) -> None:
    submit(Path("recipe.yaml"), [], Path("cluster.yaml"), names, grid, False, lambda text: None)


def send_cells(*cells: str, names: list[str] | None = None) -> None:
    Path("grid.yaml").write_text(yaml.safe_dump({"cells": [{"name": name} for name in cells]}))
    send(names, Path("grid.yaml"))


def show(run: str = str(RUN)) -> tuple[int, str]:
    said: list[str] = []
    code = status(run, said.append)
    return code, "\n".join(said)


def row(text: str, stage: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.startswith(f"{stage} "))


def train(step: int = 40) -> None:
    """Leave what a training stage has left after some steps."""
    folder = RUN / "base"
    checkpoint = folder / f"checkpoints/step-{step - 10:08}/checkpoint.json"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text(json.dumps({"step": step - 10, "save_seconds": 1.0}))
    (folder / "started.json").write_text("{}")
    record = {"step": step, "loss": 2.5, "tokens": step * 256, "tokens_per_second": 128.0}
    lines = [json.dumps(record), json.dumps({"step": step, "held_out_loss": 2.75}), '{"step": 4']
    (folder / "metrics.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize("name", ["step", "tokens", "tokens_per_second", "loss"])
@pytest.mark.parametrize("value", ["x", None, float("nan"), [1]])
def test_a_record_that_holds_no_number_is_passed_over(tmp_path, name, value):
    record = {"step": 40, "loss": 2.5, "tokens": 256, "tokens_per_second": 128.0}
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(record) + "\n" + json.dumps(record | {"step": 41, name: value}) + "\n")
    assert last_record(path) == record


def test_every_state(slurm, project):
    send()
    finish(RUN, "corpus")
    train()
    slurm.answer(squeue="102|N/A|RUNNING|test.base|None\n103|N/A|PENDING|test.out|Dependency")
    code, text = show()
    assert code == 0
    assert row(text, "corpus")[2:4] == ["finished", "101"]
    # 60 steps of 256 tokens are left, at 128 tokens a second
    assert row(text, "base")[2:] == [
        "running", "102", "RUNNING", "40/100", "10,240", "2.5000", "128", "2m00s", "step", "30",
    ]  # fmt: skip
    assert row(text, "out")[2:] == ["pending", "103", "PENDING", "(Dependency)"]
    assert show("recipe.yaml")[1] == text  # by its recipe, too


def test_a_checkpoint_set_aside_as_damaged_is_none(slurm, project):
    send()
    train()
    checkpoints = RUN / "base" / "checkpoints"
    (checkpoints / "step-00000040.damaged").mkdir()
    (checkpoints / "step-00000040.damaged" / "checkpoint.json").write_text(json.dumps({"step": 40}))
    slurm.answer(squeue="102|N/A|RUNNING|test.base|None")
    assert row(show()[1], "base")[-2:] == ["step", "30"]


def test_a_job_that_was_requeued(slurm, project):
    send()
    slurm.answer(squeue="101|N/A|PENDING|test.corpus|BeginTime")
    slurm.answer(scontrol_show_job="JobId=101 JobName=test.corpus JobState=PENDING Restarts=2 Requeue=1")
    assert row(show()[1], "corpus")[2] == "requeued"


def test_the_rank_that_failed_first(slurm, project):
    send()
    slurm.answer(squeue="102|N/A|FAILED|test.base|NonZeroExitCode\n103|N/A|CANCELLED|test.out|Dependency")
    logs = RUN / "logs"
    (logs / "base-102.log").write_text(
        "srun: error: n9: task 9: Exited with exit code 9\n"  # of the start before
        "2026-01-01 00:00:00 job 102: start 1 on n[1-2]\n"
        "srun: error: n2: tasks 3,5: Exited with exit code 2\n"
        "srun: error: n1: task 0: Killed\n"
        "2026-01-01 00:00:09 job 102: ended with exit code 137\n"
    )
    (logs / "base-102-rank3.log").write_text("step 1\nminima: DataError: the shard is short\n  what to do: x\n")
    (logs / "base-102-rank0.log").write_text("nothing to see\n")
    code, text = show()
    assert code == 1 and row(text, "base")[2] == "failed" and row(text, "out")[2] == "cancelled"
    assert "n2: tasks 3,5: Exited with exit code 2" in text and "the last lines of rank 3" in text
    assert "DataError: the shard is short" in text and "nothing to see" not in text and "n9" not in text


def test_a_rank_that_tells_an_error_is_found_without_srun(slurm, project):
    """A stage may be called `minima`, whose progress lines begin like an error."""
    send()
    slurm.answer(squeue="102|N/A|FAILED|test.base|NonZeroExitCode")
    (RUN / "logs" / "base-102.log").write_text("2026-01-01 00:00:00 job 102: start 1 on n[1-2]\n")
    (RUN / "logs" / "base-102-rank0.log").write_text("minima: step 10/50  loss 6.2281\n")
    assert "the last lines of" not in show()[1]
    (RUN / "logs" / "base-102-rank1.log").write_text("minima: DataError: the shard is short\n")
    assert "the last lines of base-102-rank1.log:" in (text := show()[1]) and "DataError: the shard is short" in text


def test_ranks_that_had_saved_are_not_blamed(slurm, project):
    send()
    slurm.answer(squeue="101|N/A|FAILED|test.corpus|NonZeroExitCode")
    (RUN / "logs" / "corpus-101.log").write_text(
        "srun: error: n1: task 0: Exited with exit code 143\nsrun: error: n2: task 1: Killed\n"
    )
    (RUN / "logs" / "corpus-101-rank1.log").write_text("Segmentation\n")
    assert "the last lines of rank 1" in show()[1]


def test_a_job_that_ended_in_its_preamble(slurm, project):
    send()
    slurm.answer(squeue="101|N/A|FAILED|test.corpus|NonZeroExitCode")
    (RUN / "logs" / "corpus-101.log").write_text("module: command not found\n")
    assert "module: command not found" in show()[1]


def test_a_part_that_failed_takes_the_merge_with_it(slurm, project):
    Path("cluster.yaml").write_text(yaml.safe_dump({"stages": {"build_data": {"array": 2}}}))
    send()
    slurm.answer(squeue="101|0|COMPLETED|test.corpus.parts|None\n101|1|FAILED|test.corpus.parts|NonZeroExitCode\n"
                 "102|N/A|CANCELLED|test.corpus.merge|Dependency\n103|N/A|CANCELLED|test.base|Dependency")  # fmt: skip
    log = RUN / "logs" / "corpus-101_1.log"
    log.with_name("corpus-101_0.log").write_text("2026-01-01 00:00:00 job 101_0: start 0 on n1\n")
    log.with_name("corpus-101_0-rank0.log").write_text("part 0 is done\n")
    log.write_text("2026-01-01 00:00:00 job 101_1: start 0 on n1\nsrun: error: n1: task 0: Exited with exit code 2\n")
    log.with_name("corpus-101_1-rank0.log").write_text("minima: DataError: no such text\n")
    code, text = show()
    assert code == 1 and row(text, "corpus")[2] == "failed" and row(text, "base")[2] == "cancelled"
    assert "corpus failed:" in text and "DataError: no such text" in text and "part 0 is done" not in text


def test_a_stage_that_was_cancelled_has_not_failed(slurm, project):
    send()
    slurm.answer(squeue="101|N/A|CANCELLED|test.corpus|None\n102|N/A|CANCELLED|test.base|Dependency\n"
                 "103|N/A|CANCELLED|test.out|Dependency")  # fmt: skip
    code, text = show()
    assert code == 0 and [row(text, stage)[2] for stage in ("corpus", "base", "out")] == ["cancelled"] * 3


def test_why_a_cell_of_a_grid_failed(slurm, project):
    send_cells("good", "bad", "ended")
    slurm.answer(squeue="101|0|RUNNING|test.cells|None\n101|1|FAILED|test.cells|NonZeroExitCode\n"
                 "101|2|CANCELLED|test.cells|None")  # fmt: skip
    finish(RUN / "cells" / "bad", "corpus")
    (RUN / "logs" / "cells-101_1.log").write_text(
        "2026-01-01 00:00:00 job 101_1: start 0 on n1\n"
        "2026-01-01 00:00:09 job 101_1: start 0 on n1\nsrun: error: n1: task 1: Exited with exit code 2\n"
    )
    logs = RUN / "cells" / "bad" / "logs"
    logs.mkdir()
    for stage, modified in (("corpus", 1), ("base", 2)):
        path = logs / f"{stage}-101_1-rank1.log"
        path.write_text(f"minima: DataError: {stage} has no text\n")
        os.utime(path, (modified, modified))
    code, text = show()
    assert code == 1 and row(text, "bad") == ["bad", "failed", "101_1", "FAILED", "(NonZeroExitCode)", "1/3"]
    assert row(text, "good")[1] == "running" and row(text, "ended")[1] == "cancelled"
    assert "bad failed:" in text and "base has no text" in text and "corpus has no text" not in text
    assert f"its logs are in {logs}" in text and "ended failed" not in text


def test_a_cell_whose_job_did_all_that_it_was_asked_for(slurm, project):
    send_cells("a", names=["corpus"])
    slurm.answer(squeue="101|0|COMPLETED|test.cells|None")
    finish(RUN / "cells" / "a", "corpus")
    code, text = show()
    assert code == 0 and row(text, "a") == ["a", "begun", "101_0", "COMPLETED", "1/3"]


def test_what_left_the_queue_is_asked_of_the_accounting(slurm, project):
    send()
    slurm.answer(squeue="error Invalid job id specified", sacct="101|OUT_OF_MEMORY|test.corpus\n102|FAILED|theirs")
    code, text = show()
    assert code == 1 and row(text, "corpus")[2:5] == ["failed", "101", "OUT_OF_MEMORY"]
    assert row(text, "base")[4] == "gone"
    assert "base failed:\n  Slurm no longer knows job 102, and no log says why it ended: submit again" in text


def test_without_slurm(project, monkeypatch, tmp_path):
    finish(RUN, "corpus")
    train()
    (RUN / "logs").mkdir()
    (RUN / "logs" / "base.log").write_text(
        "== stage base (adapt)\nminima: NotFinite: the loss is nan\n  what to do: x\n    y\n"
        + "[launch.py:363:sigkill_handler] exits with return code = 2\n  File launch.py\n" * 40
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    _, text = show()
    assert row(text, "corpus")[2] == "finished" and row(text, "base")[2:4] == ["begun", "40/100"]
    assert row(text, "out")[2:] == ["not", "begun"]
    assert "the loss is nan" in text and "    y\n" in text and "launch" not in text


def test_without_slurm_the_word_of_any_rank_counts(project, monkeypatch, tmp_path):
    finish(RUN, "corpus")
    train()
    (RUN / "logs").mkdir()
    lost = "[rank 0] the connection to another rank was lost"
    (RUN / "logs" / "base.log").write_text(f"== stage base (adapt)\n[rank 1] minima: OutOfMemory: CUDA\n{lost}\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "[rank 1] minima: OutOfMemory: CUDA" in show()[1]


def test_a_log_cannot_command_the_terminal(slurm, project):
    send()
    slurm.answer(squeue="101|N/A|FAILED|test.corpus|NonZeroExitCode")
    (RUN / "logs" / "corpus-101.log").write_text("\x1b]0;owned\x07 not found\n")
    text = show()[1]
    assert "\x1b" not in text and "not found" in text


def test_no_run(slurm, project, tmp_path):
    with pytest.raises(ClusterError, match=r"is not a run.s folder"):
        show(str(tmp_path))
    send()
    with pytest.raises(
        ClusterError, match=r"neither a run's folder nor a recipe on this machine; did you mean 'runs/test'"
    ):
        show("runs/tset")


def test_what_waits_is_cancelled_before_what_runs_is_told_to_save(slurm, project):
    send()
    slurm.answer(squeue="101|N/A|COMPLETING|test.corpus|None\n102|N/A|RUNNING|test.base|None\n"
                 "103|N/A|PENDING|test.out|Dependency")  # fmt: skip
    said: list[str] = []
    assert cancel(str(RUN), said.append) == 0
    assert slurm.calls("scancel") == [["--state=PENDING", "103"], ["--batch", "--signal=TERM", "102"]]
    assert "out: job 103 was waiting; cancelled" in said and "base: job 102 saves and ends" in said[1]


def test_a_task_of_an_array_is_told_alone(slurm, project):
    send()
    slurm.answer(squeue="102|3|RUNNING|test.base|None\n102|4|PENDING|test.base|Resources")
    cancel(str(RUN), lambda text: None)
    assert slurm.calls("scancel") == [["--state=PENDING", "102"], ["--batch", "--signal=TERM", "102_3"]]


def test_nothing_to_cancel(slurm, project):
    send()
    said: list[str] = []
    cancel(str(RUN), said.append)
    assert said == [f"no job of {RUN} is waiting or running"] and not slurm.calls("scancel")


def test_a_slurm_that_does_not_answer_takes_nothing_from_what_the_folders_say(slurm, project):
    send()
    finish(RUN, "corpus")
    train()
    slurm.answer(squeue="error slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    code, text = show()
    assert code == 0 and row(text, "corpus")[2] == "finished"
    assert row(text, "base")[2:] == [
        "submitted",
        "102",
        "not",
        "known",
        "40/100",
        "10,240",
        "2.5000",
        "128",
        "step",
        "30",
    ]
    assert "the jobs' states in Slurm are missing: squeue failed when listing" in text and "Unable to contact" in text

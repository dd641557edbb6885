"""What a job does when it is told to leave: slurm/run_stage.sh, run by bash with stand-ins for Slurm."""

import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

RUN_STAGE = Path(__file__).parents[3] / "slurm" / "run_stage.sh"
RUNNING = "JobId=7 JobName=x JobState=RUNNING Restarts=0 PreemptTime=None"
PREEMPTED = "JobId=7 JobName=x JobState=RUNNING PreemptTime=2026-01-01T00:00:00 "
CANCELLED = "JobId=7 JobName=x JobState=COMPLETING PreemptTime=None"


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "job.sh"
    path.write_text(f"set -euo pipefail\n{{settings}}\nsource {RUN_STAGE}\nrun_stage {tmp_path}/run base train 'a b'\n")

    def write(settings: str = "") -> Path:
        path.write_text(path.read_text().replace("{settings}", settings))
        return path

    return write


def end(slurm, job, *signals, told_by_slurm: bool = False) -> tuple[int, str]:
    """Send signals once the ranks run, and give the job's exit code and log.

    Args:
        slurm: the stand-ins.
        job: as it was started.
        signals: for its shell.
        told_by_slurm: the ranks get SIGTERM from Slurm, once the shell has had the time to tell them so itself.
    """
    if signals:
        until = time.monotonic() + 20
        while not (slurm.folder / "srun.started").exists():
            assert time.monotonic() < until, "srun was not started"
            time.sleep(0.02)
    for number in signals:
        job.send_signal(number)
    if told_by_slurm:
        time.sleep(1.0)
        (slurm.folder / "told").touch()
    log, _ = job.communicate(timeout=40)
    return job.returncode, log


def saved(tmp_path: Path, step: int = 10) -> str:
    return str(tmp_path / f"run/base/checkpoints/step-{step:08}/checkpoint.json")


def test_the_ranks_are_started_by_srun(slurm, script, tmp_path):
    code, _ = end(slurm, slurm.job(script(), SLURM_CPUS_PER_TASK="3"))
    [arguments] = slurm.calls("srun")
    assert code == 0
    assert arguments[-2:] == ["train", "a b"]
    assert {"--kill-on-bad-exit=1", "--open-mode=append", "--cpus-per-task=3"} < set(arguments)
    assert f"--output={tmp_path}/run/logs/base-7-rank%t.log" in arguments
    assert not slurm.calls("scancel") and ["requeue", "7"] not in slurm.calls("scontrol")


def test_before_the_time_limit_the_ranks_save_and_the_job_is_requeued(slurm, script, tmp_path):
    slurm.answer(srun=f"wait 143 {saved(tmp_path)}", scontrol_show_job=RUNNING)
    code, log = end(slurm, slurm.job(script()), signal.SIGUSR1)
    assert slurm.calls("scancel") == [["--signal=TERM", "7"]]  # to the ranks: SIGTERM, not USR1, and not through srun
    assert slurm.calls("scontrol")[-1] == ["requeue", "7"]
    assert code == 143 and "requeued" in log


def test_an_array_s_task_is_told_by_its_own_number(slurm, script, tmp_path):
    slurm.answer(
        srun=f"wait 143 {saved(tmp_path)}", scontrol_show_job="JobId=7 ArrayJobId=5 ArrayTaskId=1 JobState=RUNNING"
    )
    end(slurm, slurm.job(script(), SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="1"), signal.SIGUSR1)
    assert slurm.calls("scancel") == [["--signal=TERM", "5_1"]] and slurm.calls("scontrol")[-1] == ["requeue", "5_1"]


def test_the_array_of_another_job_is_left_alone(slurm, script, tmp_path):
    """Submitted by hand in the shell of an array's task, a job inherits that one's SLURM_ARRAY_*."""
    slurm.answer(
        srun=f"wait 143 {saved(tmp_path)}", scontrol_show_job="JobId=6 ArrayJobId=5 ArrayTaskId=1 JobState=RUNNING"
    )
    inherited = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "1", "SCANCEL_BATCH": "true"}
    bound = {"SLURM_CPU_BIND": "mask_cpu:0x1", "SLURM_CPU_BIND_TYPE": "mask_cpu:"}
    end(slurm, slurm.job(script(), **inherited, **bound), signal.SIGUSR1)
    assert slurm.calls("scancel") == [["--signal=TERM", "7"]] and slurm.calls("scontrol")[-1] == ["requeue", "7"]
    assert not {"SLURM_CPU_BIND", "SLURM_CPU_BIND_TYPE"} & set(slurm.entries("srun")[0]["names"])
    assert "SCANCEL_BATCH" not in slurm.entries("scancel")[0]["names"]


def test_what_a_user_exports_for_srun_stays(slurm, script):
    slurm.job(script(), SLURM_CPU_BIND="cores").communicate()
    assert "SLURM_CPU_BIND" in slurm.entries("srun")[0]["names"]
    assert "--export=ALL" in slurm.calls("srun")[0], "whatever the job itself was submitted with"


@pytest.mark.parametrize("name", ["-x", "(", "!", "a b"])
def test_a_folder_whose_name_is_like_an_option_or_an_expression(slurm, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "job.sh"
    path.write_text(f"set -eu\nsource {RUN_STAGE}\nrun_stage {shlex.quote(name)} base python x\n")
    marker = tmp_path / name / "base/checkpoints/step-00000010/checkpoint.json"
    slurm.answer(srun=f"wait 143 {marker}" if " " not in name else "wait 143", scontrol_show_job=RUNNING)
    _, log = end(slurm, slurm.job(path), signal.SIGUSR1)
    assert (tmp_path / name / "logs").is_dir(), log
    assert ("nothing new was saved" in log) == (" " in name), log


def test_ranks_that_finish_after_all_are_not_requeued(slurm, script, tmp_path):
    slurm.answer(srun=f"wait 0 {saved(tmp_path)}", scontrol_show_job=RUNNING)
    code, _ = end(slurm, slurm.job(script()), signal.SIGUSR1)
    assert code == 0 and ["requeue", "7"] not in slurm.calls("scontrol")


@pytest.mark.parametrize("code", [1, 2, 4])
def test_a_stage_that_fails_by_itself_is_not_requeued(slurm, script, tmp_path, code):
    slurm.answer(srun=f"wait {code} {saved(tmp_path)}", scontrol_show_job=RUNNING)
    assert end(slurm, slurm.job(script()), signal.SIGUSR1)[0] == code
    assert ["requeue", "7"] not in slurm.calls("scontrol")


def test_a_killed_rank_is_not_requeued(slurm, script):
    slurm.answer(srun="exit 137", scontrol_show_job=RUNNING)
    assert end(slurm, slurm.job(script()))[0] == 137
    assert ["requeue", "7"] not in slurm.calls("scontrol")


NODES = """\
NodeName=n1 State=MIXED ThreadsPerCore=1 BootTime=2026-01-01T00:00:00 SlurmdStartTime=2026-01-01T00:00:09 Reason=x
NodeName=n2 State={state} ThreadsPerCore=1 BootTime=2026-01-01T00:00:00 SlurmdStartTime={started} LastBusyTime=x"""
LONG_AGO = "2026-01-01T00:00:09"
LATER = "2999-01-01T00:00:00"


@pytest.mark.parametrize(
    ("state", "started"),
    [("MIXED*", LONG_AGO), ("DOWN", LONG_AGO), ("MIXED+DRAIN", LONG_AGO), ("MIXED", LATER)],
)
@pytest.mark.parametrize("code", [1, 4, 137])
def test_ranks_that_fail_with_a_node_are_started_again(slurm, script, code, state, started):
    nodes = NODES.format(state=state, started=started)
    slurm.answer(srun=f"exit {code}", scontrol_show_job=RUNNING, scontrol_show_node=nodes)
    returned, log = end(slurm, slurm.job(script(), SLURM_TIME_FORMAT="relative"))
    assert slurm.calls("scontrol")[-1] == ["requeue", "7"] and slurm.calls("scontrol")[0][:2] == ["show", "node"]
    assert {entry["times"] for entry in slurm.entries("scontrol")} == {"standard"}
    assert returned == code and "node n2 was lost or drained meanwhile" in log


@pytest.mark.parametrize("code", [1, 2, 4, 137])
@pytest.mark.parametrize("started", [LONG_AGO, "None"])
def test_ranks_that_fail_on_nodes_in_service_are_not(slurm, script, code, started):
    state = "MIXED*" if code == 2 else "MIXED"  # a mistake stays one
    nodes = NODES.format(state=state, started=started)
    slurm.answer(srun=f"exit {code}", scontrol_show_job=RUNNING, scontrol_show_node=nodes)
    assert end(slurm, slurm.job(script()))[0] == code
    assert ["requeue", "7"] not in slurm.calls("scontrol")


def test_a_cancelled_job_stays_so_though_a_node_was_lost(slurm, script, tmp_path):
    nodes = NODES.format(state="DOWN*", started=LONG_AGO)
    slurm.answer(srun=f"wait 143 {saved(tmp_path)}", scontrol_show_job=RUNNING, scontrol_show_node=nodes)
    end(slurm, slurm.job(script()), signal.SIGTERM)
    assert slurm.calls("scancel")[-1] == ["7"] and ["requeue", "7"] not in slurm.calls("scontrol")


def test_a_lost_node_counts_as_a_requeue(slurm, script):
    nodes = NODES.format(state="DOWN*", started=LONG_AGO)
    slurm.answer(srun="exit 1", scontrol_show_job=RUNNING, scontrol_show_node=nodes)
    job = slurm.job(script("max_requeues=2"), SLURM_RESTART_COUNT="2")
    code, log = end(slurm, job)
    assert code == 1 and "not requeued" in log and ["requeue", "7"] not in slurm.calls("scontrol")


def test_a_start_that_saves_nothing_new_would_be_repeated_for_ever(slurm, script, tmp_path):
    old = Path(saved(tmp_path, 5))
    old.parent.mkdir(parents=True)
    old.touch()
    slurm.answer(srun="wait 143", scontrol_show_job=RUNNING)
    code, log = end(slurm, slurm.job(script()), signal.SIGUSR1)
    assert code == 143 and "nothing new was saved" in log
    assert ["requeue", "7"] not in slurm.calls("scontrol")


def test_the_most_requeues(slurm, script, tmp_path):
    slurm.answer(srun=f"wait 143 {saved(tmp_path)}", scontrol_show_job=RUNNING)
    job = slurm.job(script("max_requeues=2"), SLURM_RESTART_COUNT="2")
    code, log = end(slurm, job, signal.SIGUSR1)
    assert code == 143 and "not requeued" in log and ["requeue", "7"] not in slurm.calls("scontrol")


def test_a_cancelled_job_stays_cancelled(slurm, script, tmp_path):
    slurm.answer(srun=f"wait 143 {saved(tmp_path)}", scontrol_show_job=CANCELLED)
    code, log = end(slurm, slurm.job(script()), signal.SIGTERM, told_by_slurm=True)
    assert code == 143 and "the ranks save" in log
    assert not slurm.calls("scancel")  # a second SIGTERM would end the ranks before they have saved
    assert ["requeue", "7"] not in slurm.calls("scontrol")


def test_a_job_that_is_told_alone_tells_its_ranks_and_cancels_itself(slurm, script, tmp_path):
    slurm.answer(srun=f"wait 143 {saved(tmp_path)}", scontrol_show_job=RUNNING)
    code, log = end(slurm, slurm.job(script()), signal.SIGTERM)
    assert slurm.calls("scancel") == [["--signal=TERM", "7"], ["7"]]
    assert code == 143 and "cancelled" in log and ["requeue", "7"] not in slurm.calls("scontrol")


def test_a_preemption_that_told_the_ranks_alone(slurm, script, tmp_path):
    slurm.answer(srun=f"exit 143 {saved(tmp_path)}", scontrol_show_job=PREEMPTED)
    assert end(slurm, slurm.job(script()))[0] == 143
    assert slurm.calls("scontrol")[-1] == ["requeue", "7"]  # else it counts as failed, and so does what waits for it


@pytest.mark.parametrize(
    ("version", "kind", "mode", "requeue", "asked"),
    [
        ("22.05.8", "partition_prio", "REQUEUE", 1, True),
        ("23.11.4", "partition_prio", "REQUEUE", 1, True),
        ("24.11.5", "partition_prio", "REQUEUE", 1, False),
        ("26.05.0-0rc1", "partition_prio", "REQUEUE", 1, False),
        ("24.11.5", "partition_prio", "CANCEL", 1, True),
        ("24.11.5", "qos", "REQUEUE", 1, True),  # a QOS may say another mode
        ("24.11.5", "partition_prio", "REQUEUE", 0, True),  # which scontrol refuses, and the log says so
    ],
)
def test_a_slurm_that_puts_a_preempted_job_back_itself_is_not_asked_to(
    slurm, script, tmp_path, version, kind, mode, requeue, asked
):
    slurm.answer(
        srun=f"exit 143 {saved(tmp_path)}",
        scontrol_show_job=f"{PREEMPTED}Requeue={requeue} Restarts=0",
        scontrol_show_config=f"PreemptMode             = REQUEUE\nPreemptType             = preempt/{kind}",
        scontrol_show_partition=f"PartitionName=normal\n   PreemptMode={mode}",
        **{"scontrol --version": f"slurm {version}"},
    )
    code, log = end(slurm, slurm.job(script(), SLURM_JOB_PARTITION="normal"))
    assert code == 143 and (["requeue", "7"] in slurm.calls("scontrol")) == asked
    assert ("Slurm requeues it" in log) != asked


def test_a_warning_that_follows_a_preemption_does_not_tell_the_ranks_twice(slurm, script, tmp_path):
    slurm.answer(srun=f"wait 143 {saved(tmp_path)}", scontrol_show_job=PREEMPTED)
    end(slurm, slurm.job(script()), signal.SIGUSR1, told_by_slurm=True)
    assert not slurm.calls("scancel")
    assert slurm.calls("scontrol")[-1] == ["requeue", "7"]


def test_where_a_preemption_sends_usr1_alone_the_ranks_are_told(slurm, script, tmp_path):
    config = "PreemptParameters       = send_user_signal"
    slurm.answer(srun=f"wait 143 {saved(tmp_path)}", scontrol_show_job=PREEMPTED, scontrol_show_config=config)
    end(slurm, slurm.job(script()), signal.SIGUSR1)
    assert slurm.calls("scancel") == [["--signal=TERM", "7"]]


def test_two_warnings_tell_the_ranks_once(slurm, script, tmp_path):
    slurm.answer(srun=f"wait 143 {saved(tmp_path)}", scontrol_show_job=RUNNING)
    end(slurm, slurm.job(script()), signal.SIGUSR1, signal.SIGUSR1)
    assert slurm.calls("scancel") == [["--signal=TERM", "7"]]


def test_a_task_of_an_array_speaks_of_itself_alone(slurm, script, tmp_path):
    slurm.answer(srun=f"wait 143 {saved(tmp_path)}", scontrol_show_job=RUNNING)
    end(slurm, slurm.job(script(), SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3"), signal.SIGUSR1)
    assert slurm.calls("scancel") == [["--signal=TERM", "7_3"]]
    assert slurm.calls("scontrol")[-1] == ["requeue", "7_3"]


def test_a_launcher_that_the_job_was_submitted_from_is_forgotten(slurm, script):
    end(slurm, slurm.job(script(), RANK="3", WORLD_SIZE="8", LOCAL_RANK="3"))
    assert [entry["rank"] for entry in slurm.entries("srun")] == [None]


@pytest.mark.parametrize(
    "left",
    ["pruned/scores.safetensors", "aligned/reference-0a1b-train.safetensors", "bench/lm_eval/drop/results.json",
     "bench/answers/mt_bench.answered", "base/manifest.json"],
)  # fmt: skip
def test_whatever_a_later_start_goes_on_from_is_progress(slurm, script, tmp_path, left):
    slurm.answer(srun=f"wait 143 {tmp_path}/run/{left}", scontrol_show_job=RUNNING)
    code, log = end(slurm, slurm.job(script()), signal.SIGUSR1)
    assert code == 143 and "nothing new was saved" not in log
    assert ["requeue", "7"] in slurm.calls("scontrol")


def test_answers_that_are_added_to_a_file_are_progress(tmp_path):
    """A benchmark's answers lie in one file, which grows."""
    answered = tmp_path / "bench" / "answers" / "mt_bench.answered"
    answered.parent.mkdir(parents=True)
    code = f"source <(sed -n '/^progress_of/,/^}}/p' {RUN_STAGE}); progress_of {tmp_path}"
    seen = []
    for text in ("", "one\n", "one\n", "one\ntwo\n"):
        answered.write_text(text)
        seen.append(subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout)
    assert seen[1] == seen[2] and len(set(seen)) == 3

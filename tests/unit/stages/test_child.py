"""Whom a signal to the driver reaches: the ranks, and no launcher that would end them before they have saved.

And what becomes of a run whose terminal goes, or whose output nobody reads any more.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from minima import console
from minima.stages.driver.child import Log, signal_ranks

# Starts a program as `minima run` does; tells a file its exit code. In a session of its own its output is its terminal.
DRIVER = """
import fcntl, os, sys, termios
from pathlib import Path
from minima.stages.driver.child import Log, run_child
if os.isatty(1):
    fcntl.ioctl(1, termios.TIOCSCTTY, 0)
with Log(Path("logs"), "stage") as log:
    code = run_child([sys.executable, "-c", sys.argv[1]], os.environ, log, 0)
Path("code").write_text(str(code))
"""
SAVING = """
import signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
for second in range(100):
    print("step", second, flush=True)
    time.sleep(0.05)
    if asked:
        print("saving", flush=True)
        time.sleep(0.5)
        print("saved", flush=True)
        sys.exit(143)
"""
RANK = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\nprint('up', flush=True)\n"
RANK += "time.sleep(30)\n"


def launcher(tmp_path: Path, name: str, body: str) -> subprocess.Popen:
    """A program called `name` in a session of its own, with PATH beginning where it lies."""
    program = tmp_path / name
    program.write_bytes(Path("/bin/bash").read_bytes())  # a process is called by its file, and a script by its shell
    program.chmod(0o755)
    return subprocess.Popen(
        [str(program), "-c", body, name], start_new_session=True, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHON": sys.executable, "CODE": RANK},
    )  # fmt: skip


def test_the_ranks_get_it_and_their_launcher_does_not(tmp_path):
    body = 'trap "echo launcher told" TERM; RANK=0 "$PYTHON" -c "$CODE" minima stage & wait $!; echo "rank left $?"'
    child = launcher(tmp_path, "torchrun", body)
    assert child.stdout is not None and child.stdout.readline() == "up\n"
    signal_ranks(child.pid, signal.SIGTERM)
    assert child.communicate(timeout=10)[0] == "rank left 7\n"


def test_ranks_in_sessions_of_their_own_get_it_too(tmp_path, monkeypatch):
    """As torchrun's: told by it instead, they would have 30 s for their save."""
    monkeypatch.setenv("MINIMA_DRIVER", mark := uuid.uuid4().hex)
    body = 'trap "echo launcher told" TERM; RANK=0 setsid "$PYTHON" -c "$CODE" minima stage & wait $!; '
    child = launcher(tmp_path, "torchrun", body + 'echo "rank left $?"')
    assert child.stdout is not None and child.stdout.readline() == "up\n"
    signal_ranks(child.pid, signal.SIGTERM, driver=mark)
    assert child.communicate(timeout=10)[0] == "rank left 7\n"


def test_where_no_rank_is_there_the_whole_session_gets_it(tmp_path):
    child = launcher(tmp_path, "starting", "echo up; read -r -t 30 <> <(:)")
    assert child.stdout is not None and child.stdout.readline() == "up\n"
    signal_ranks(child.pid, signal.SIGTERM)
    assert child.wait(timeout=10) == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ranks_of_srun_are_told_by_slurm_since_srun_would_kill_them(tmp_path, monkeypatch, number):
    (tmp_path / "scancel").write_text(f'#!/bin/sh\necho "$@" > "{tmp_path}/told"\n')
    (tmp_path / "scancel").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    child = launcher(tmp_path, "srun", "echo up; read -r -t 30 <> <(:)")
    assert child.stdout is not None and child.stdout.readline() == "up\n"
    signal_ranks(child.pid, number)
    time.sleep(0.2)
    assert child.poll() is None, "srun itself got nothing"
    assert (tmp_path / "told").read_text() == f"--signal={number.name[3:]} 77\n"
    child.kill()
    child.wait()


def driver(
    tmp_path: Path,
    output: int,
    body: str,
    hang_up: str = "--default-signal=HUP",
    shell: bool = False,
    program: str = DRIVER,
) -> subprocess.Popen:
    """Runs until the stage's first step, under nohup or not whatever these tests run under.

    With `shell` as the job of a shell that could continue it, else in a session of its own.
    """
    child = subprocess.Popen(
        ["env", hang_up, sys.executable, "-c", program, body], cwd=tmp_path, stdin=output, stdout=output, stderr=output,
        start_new_session=not shell, process_group=0 if shell else None,
    )  # fmt: skip
    os.close(output)
    log = tmp_path / "logs" / "stage.log"
    for _ in range(400):
        if log.exists() and "step 0" in log.read_text():
            return child
        time.sleep(0.05)
    raise AssertionError("the stage did not start")


def last_words(tmp_path: Path, child: subprocess.Popen) -> tuple[str, int]:
    """The last line of the stage's log, and what its driver makes of its end."""
    child.wait(timeout=20)
    return (tmp_path / "logs" / "stage.log").read_text().splitlines()[-1], int((tmp_path / "code").read_text())


def test_when_the_terminal_goes_the_run_is_saved_and_its_log_is_whole(tmp_path):
    ours, theirs = os.openpty()
    child = driver(tmp_path, theirs, SAVING)
    os.close(ours)
    assert last_words(tmp_path, child) == ("saved", 128 + signal.SIGHUP)


def test_under_nohup_a_run_outlives_its_terminal(tmp_path):
    ours, theirs = os.openpty()
    child = driver(tmp_path, theirs, SAVING.replace("100", "20"), "--ignore-signal=HUP")
    os.close(ours)
    assert last_words(tmp_path, child) == ("step 19", 0)


def test_a_run_whose_output_nobody_reads_on_is_saved_first(tmp_path):
    ours, theirs = os.pipe()
    child = driver(tmp_path, theirs, SAVING)
    os.close(ours)
    assert last_words(tmp_path, child) == ("saved", console.UNREAD)


def steps(tmp_path: Path) -> int:
    return (tmp_path / "logs" / "stage.log").read_text().count("step")


def states(process: psutil.Process) -> list[str]:
    return [one.status() for one in (process, *process.children(recursive=True))]


def wait_until(true) -> None:
    for _ in range(400):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("waited for 20 s")


def test_ctrl_z_stops_the_ranks_too_and_fg_goes_on(tmp_path):
    ours, theirs = os.pipe()
    # The ranks are in a process group of their own, as with mpirun.
    nested = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {SAVING!r}], process_group=0)"
    child = driver(tmp_path, theirs, nested, shell=True)
    process = psutil.Process(child.pid)
    for _ in range(2):
        child.send_signal(signal.SIGTSTP)
        wait_until(lambda: states(process) == [psutil.STATUS_STOPPED] * 3)
        before = steps(tmp_path)
        time.sleep(0.3)
        assert steps(tmp_path) == before
        child.send_signal(signal.SIGCONT)
        wait_until(lambda: steps(tmp_path) > before)  # noqa: B023
    assert psutil.STATUS_STOPPED not in states(process)
    child.kill()
    process.wait()
    os.close(ours)


def test_where_nobody_could_go_on_again_ctrl_z_stops_nothing(tmp_path):
    ours, theirs = os.pipe()
    child = driver(tmp_path, theirs, SAVING.replace("100", "20"))
    child.send_signal(signal.SIGTSTP)
    assert last_words(tmp_path, child) == ("step 19", 0)
    os.close(ours)


def test_a_terminal_that_stands_still_holds_up_no_rank(tmp_path):
    ours, theirs = os.pipe()
    child = driver(tmp_path, theirs, "for step in range(1000):\n    print('step', step, 'x' * 1000)")
    wait_until(lambda: steps(tmp_path) == 1000)  # fifteen times what a pipe holds, and nobody has read any of it
    assert not (tmp_path / "code").exists(), "the person will still see all of it"
    with open(ours, "rb") as reader:
        assert reader.read() == (tmp_path / "logs" / "stage.log").read_bytes()
    assert last_words(tmp_path, child)[1] == 0


@pytest.mark.slow
def test_a_run_that_is_told_to_end_waits_for_no_terminal(tmp_path):
    ours, theirs = os.pipe()
    child = driver(tmp_path, theirs, SAVING.replace('"step", second', '"step", second, "x" * 10_000'))
    wait_until(lambda: steps(tmp_path) > 10)
    child.send_signal(signal.SIGTERM)
    assert last_words(tmp_path, child) == ("saved", 128 + signal.SIGTERM)
    os.close(ours)


LOUD = "for step in range(1000):\n    print('step', step, 'x' * 1000)\nraise SystemExit(%d)"


@pytest.mark.parametrize(("code", "told"), [(0, console.UNREAD), (3, 3)])
def test_a_reader_that_goes_after_the_end_hides_no_failure(tmp_path, code, told):
    ours, theirs = os.pipe()
    child = driver(tmp_path, theirs, LOUD % code)
    wait_until(lambda: steps(tmp_path) == 1000)
    time.sleep(0.5)
    os.close(ours)
    assert last_words(tmp_path, child)[1] == told


@pytest.mark.slow
@pytest.mark.parametrize(("code", "told"), [(0, 128 + signal.SIGTERM), (3, 3)])
def test_a_signal_after_the_end_waits_for_no_terminal(tmp_path, code, told):
    ours, theirs = os.pipe()
    child = driver(tmp_path, theirs, LOUD % code)
    wait_until(lambda: steps(tmp_path) == 1000)
    time.sleep(0.5)
    child.send_signal(signal.SIGTERM)
    assert last_words(tmp_path, child)[1] == told
    os.close(ours)


def test_a_stage_outlives_its_log(tmp_path):
    """Its folder is removed while it runs, or something else lies in a log's place."""
    with Log(tmp_path / "logs", "first") as log:
        log.write(b"one\n")
        shutil.rmtree(tmp_path / "logs")
        log.write(b"two\n== stage second (kind)\nthree\n")
        assert (tmp_path / "logs" / "second.log").read_text() == "== stage second (kind)\nthree\n" and not log.lacks
        (tmp_path / "logs" / "third.log").mkdir()
        log.write(b"== stage third (kind)\nfour\n== stage fourth (kind)\n")
        assert log.lacks and "third.log" in log.lacks
        shutil.rmtree(tmp_path / "logs")
        tmp_path.rename(tmp_path.with_name("elsewhere"))
        log.write(b"== stage fifth (kind)\nminima: DataError: told\nsix")
    assert log.error == "DataError: told" and not tmp_path.exists(), "no second run folder with nothing but logs in it"
    tmp_path.with_name("elsewhere").rename(tmp_path)


def test_of_a_bar_that_is_rewritten_for_weeks_only_the_last_state_is_held(tmp_path):
    with Log(tmp_path, "stage") as log:
        for step in range(1000):
            log.write(b"\rstep %d of 1000" % step + b" " * 100)
        assert len(log._rest) < 200
        log.write(b"\rstep 1000 of 1000\r")
        log.write(b"\nminima: DataError: told\none\r")
        log.write(b"\n\r\rhalf")
        log.write(b" a line\r\r")
    assert (tmp_path / "stage.log").read_text() == "step 1000 of 1000\nminima: DataError: told\none\nhalf a line\n"
    assert log.error == "DataError: told"


def test_what_is_found_in_a_log_does_not_depend_on_where_the_pipe_cuts_it(tmp_path):
    whole = b"\rstep 1\rstep 2\r\nbar\rminima: DataError: bad\n\rstopped by signal 15: step 3\r\nend"
    found = set()
    for cut in range(len(whole)):
        with Log(tmp_path, f"cut{cut}") as log:
            log.write(whole[:cut])
            log.write(whole[cut:])
        found.add((log.error, log.stopped, (tmp_path / f"cut{cut}.log").read_text()))
    assert found == {("DataError: bad", 15, "step 2\nminima: DataError: bad\nstopped by signal 15: step 3\nend\n")}


@pytest.mark.parametrize("error", [None, "StoreCorrupted: a is damaged"])
def test_what_a_stage_called_minima_prints_is_no_error(tmp_path, error):
    with Log(tmp_path, "minima") as log:
        log.write(b"== stage minima (distil)\nminima: memory of one rank\nminima: MiniMA: held-out loss 2\n")
        log.write(f"minima: {error}\n".encode() if error else b"stopped by signal 15: step 20 of 50 is saved\n")
    assert (log.error, log.stopped) == (error, None if error else 15)


def test_a_log_on_a_full_disk_ends_no_stage(tmp_path):
    (tmp_path / "stage.log").symlink_to("/dev/full")
    with Log(tmp_path, "stage") as log:
        log.write(b"one\n")
    assert log.lacks and "No space" in log.lacks


def test_a_failure_of_the_driver_ends_the_stage_whatever_the_terminal_does(tmp_path):
    ours, theirs = os.pipe()
    broken = "Log._change = lambda *_: 1 / 0\nwith Log"
    body = LOUD.replace("raise", "print('== stage next (x)', flush=True)\nimport time\ntime.sleep(100)\nraise") % 0
    body = body.replace("for", "import time\nprint('step 0', flush=True)\ntime.sleep(1)\nfor", 1)
    child = driver(tmp_path, theirs, body, program=DRIVER.replace("with Log", broken))
    (stage,) = psutil.Process(child.pid).children()
    wait_until(lambda: not stage.is_running() or stage.status() == psutil.STATUS_ZOMBIE)
    os.close(ours)
    child.wait(timeout=20)
    assert not (tmp_path / "code").exists()


def test_output_that_cannot_be_written_ends_the_run(tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", DRIVER, SAVING]
        child = subprocess.Popen(command, cwd=tmp_path, stdout=full, stderr=subprocess.DEVNULL)
    assert child.wait(timeout=20) == 1 and not (tmp_path / "code").exists()
    assert "step 99" not in (tmp_path / "logs" / "stage.log").read_text()

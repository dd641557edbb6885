"""One writer per run folder."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from minima.errors import DiskFull, StageError
from minima.stages import lock
from minima.stages.lock import run_lock

HOLD = "import sys, time\nfrom pathlib import Path\nfrom minima.stages.lock import run_lock\n"
HOLD += "with run_lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"


@pytest.fixture
def holder(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    yield child
    child.kill()
    child.wait()


def test_a_second_run_is_refused_and_told_who(tmp_path, holder):
    with pytest.raises(StageError, match=rf"process {holder.pid} on .*, since 20"), run_lock(tmp_path):
        pass


def test_a_group_may_take_turns(tmp_path):
    before = os.umask(0o002)
    try:
        with run_lock(tmp_path / "run"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "run" / "lock").stat().st_mode & 0o777 == 0o664


def test_a_file_system_that_takes_no_writes_is_named(tmp_path, monkeypatch):
    """As some mounts of buckets: what is opened may then not be written."""

    def refuse(descriptor, length):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(StageError, match="cannot be used"), run_lock(tmp_path):
        raise AssertionError


def test_what_fails_under_the_lock_is_what_is_told(tmp_path, monkeypatch):
    def refuse(descriptor, length):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def work():
        with run_lock(tmp_path):
            monkeypatch.setattr(os, "ftruncate", refuse)
            raise DiskFull("mine", "", "")

    with pytest.raises(DiskFull, match="mine"):
        work()


def test_a_job_is_named_by_its_id(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with run_lock(tmp_path), pytest.raises(StageError, match=r"\(Slurm job 77\), since"), run_lock(tmp_path):
        pass


def test_a_dead_holders_lock_is_taken_over(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / "lock").read_text())["pid"] == holder.pid, "it had no time to clean up"
    with run_lock(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_launcher_that_outlives_its_driver_keeps_the_lock(tmp_path):
    driver = (
        HOLD.replace("time.sleep(60)", "pass")
        .replace("print('held', flush=True)", "pass")
        .replace(
            "(sys.argv[1])):",
            "(sys.argv[1])) as lock:\n    import subprocess, os\n"
            "    child = subprocess.Popen(['sleep', '60'], pass_fds=[lock], stdout=subprocess.DEVNULL)\n"
            "    print(child.pid, flush=True)\n    os._exit(1)",
        )
    )
    done = subprocess.run([sys.executable, "-c", driver, str(tmp_path)], stdout=subprocess.PIPE)  # fmt: skip
    orphan = int(done.stdout)
    try:
        with pytest.raises(StageError, match="in use"), run_lock(tmp_path):
            pass
    finally:
        os.kill(orphan, signal.SIGKILL)
    for _ in range(100):
        try:
            with run_lock(tmp_path):
                return
        except StageError:
            time.sleep(0.05)
    pytest.fail("the lock stayed after its last holder had ended")


def test_it_can_be_taken_again(tmp_path):
    for _ in range(2):
        with run_lock(tmp_path):
            pass
    assert (tmp_path / "lock").read_text() == ""


def test_a_holder_that_leaves_in_time_is_waited_for(tmp_path, holder):
    threading.Timer(0.5, holder.kill).start()
    with run_lock(tmp_path, wait_seconds=20):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, caplog):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with run_lock(tmp_path):
        assert "does not support locks" in caplog.text


@pytest.mark.parametrize("output", ["small.yaml/x", "small.yaml", "/proc/x"])
def test_a_folder_that_cannot_be_made_is_a_mistake_to_mend(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").touch()
    with pytest.raises(StageError, match=rf"the folder {output} cannot be used \(.*{output}") as refused:
        run_lock(Path(output)).__enter__()
    assert "output=PATH" in refused.value.do


def test_a_folder_that_is_somebody_elses_and_one_on_a_full_disk(tmp_path, monkeypatch):
    for number, kind in ((errno.EACCES, StageError), (errno.EROFS, StageError), (errno.ENOSPC, DiskFull)):

        def refuse(*given, number=number):
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(lock.os, "open", refuse)
            with pytest.raises(kind, match=os.strerror(number)):
                run_lock(tmp_path).__enter__()


def test_a_link_in_its_place_is_not_followed(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.write_text("what somebody else has written")
    run = tmp_path / "run"
    run.mkdir()
    (run / "lock").symlink_to(theirs)
    with pytest.raises(StageError, match="lock is a symbolic link"), run_lock(run):
        pass
    assert theirs.read_text() == "what somebody else has written"

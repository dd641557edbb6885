"""One writer per run folder: a file lock that the kernel frees when its holder dies, and that names the holder."""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minima.errors import StageError
from minima.launcher import slurm_job
from minima.stages.run_folder import access_named

_POLL_SECONDS = 0.2
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system without locks: Lustre mounted with noflock
logger = logging.getLogger("minima.lock")


@contextmanager
def run_lock(folder: Path, wait_seconds: float = 0.0) -> Iterator[int]:
    """Hold the lock of a run folder.

    The kernel frees it when the last process that holds it ends, however it ends, so a dead holder's lock is simply
    taken over. Launchers inherit it from the driver: while they live, no second run starts beside them.

    Args:
        folder: the run's; made if it is missing.
        wait_seconds: for another holder to leave. The server of a network file system keeps a lost machine's locks for
            a while, so a job that was requeued after a node failure finds its own earlier life there.

    Yields:
        The file descriptor to hand to a launcher (`pass_fds`).

    Raises:
        StageError: another run holds it; the message names host, process and start time. Or the folder cannot be made.
    """
    with access_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:  # whoever may write here could have put a link in its place, and the holder writes into it
            descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise StageError(
                f"{folder / 'lock'} is a symbolic link",
                "a run writes its name there, and would overwrite the file that the link points to",
                "remove the link",
            ) from None
    try:
        _take(descriptor, folder, wait_seconds)
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        holder |= {"job": job.job_id} if (job := slurm_job()) else {}
        with access_named(folder):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        try:
            yield descriptor
        finally:
            with suppress(OSError):  # on a disk that is full, or has gone, what is under way says so
                os.ftruncate(descriptor, 0)  # nobody is named by a lock that nobody holds
    finally:
        os.close(descriptor)


def _take(descriptor: int, folder: Path, wait_seconds: float) -> None:
    until = time.monotonic() + wait_seconds
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise StageError(
                    f"{folder} is in use by {_holder(descriptor)}",
                    "two runs in one folder would overwrite each other's stages",
                    "wait for it, end it (or the ranks that it left behind), or take another folder with output=PATH",
                ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return logger.warning(
                "%s: this file system keeps no locks, so a second run here would not be refused", folder
            )
        time.sleep(_POLL_SECONDS)


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        job = f" (Slurm job {holder['job']})" if "job" in holder else ""
        return f"process {holder['pid']} on {holder['host']}{job}, since {holder['since']}"
    except (json.JSONDecodeError, KeyError, TypeError):
        return "another run that has not said which"

"""One writer per run folder: a file lock that the kernel releases when its holder dies, and that names the holder."""

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
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # no locks, as on Lustre mounted with noflock
logger = logging.getLogger("minima.lock")


@contextmanager
def run_lock(folder: Path, wait_seconds: float = 0.0) -> Iterator[int]:
    """Hold the lock of a run folder.

    The kernel releases it when the last process that holds it ends, however it ends, so a dead holder's lock can be
    taken at once. Launchers inherit it from the driver: while they live, no second run starts beside them.

    Args:
        folder: the run's; created if missing.
        wait_seconds: how long to wait for another holder. The server of a network file system keeps a lost machine's
            locks for a while, so a job that was requeued after a node failure finds its own earlier lock.

    Yields:
        The file descriptor to pass to a launcher (`pass_fds`).

    Raises:
        StageError: another run holds it (the message names host, process and start time), or the folder cannot be
            created.
    """
    with access_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:  # the lock's holder writes into it, and another user of the folder could have replaced it by a link
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
            with suppress(OSError):  # if the disk is full or gone, the error under way says so
                os.ftruncate(descriptor, 0)  # a lock that nobody holds must name nobody
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
                    "wait for it, end it (or the ranks that it left behind), or use another folder with output=PATH",
                ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return logger.warning(
                "%s: this file system does not support locks, so a second run here would not be refused", folder
            )
        time.sleep(_POLL_SECONDS)


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        job = f" (Slurm job {holder['job']})" if "job" in holder else ""
        return f"process {holder['pid']} on {holder['host']}{job}, since {holder['since']}"
    except (json.JSONDecodeError, KeyError, TypeError):
        return "another run that has not identified itself"

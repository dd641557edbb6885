"""DeepSpeed's compiled ops, loaded so that no build that was killed holds up a later process."""

import fcntl
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.cpp_extension import _get_build_directory

_LONGEST_BUILD_SECONDS = 900  # two minutes on one slow core
_SAY_AFTER_SECONDS = 5.0
logger = logging.getLogger("minima.ops")


def load_op(builder: Any) -> Any:
    """Load an op, and build it first where it is not there yet.

    PyTorch's own lock is a file that lies in the op's folder while it is built or loaded. A process that is killed
    leaves it, and whoever comes later waits for it without end. So one process after another loads an op under a lock
    of the kernel, which is gone with its holder: PyTorch's lock, found under ours, is then a dead process's.

    Args:
        builder: one of DeepSpeed's op builders.

    Returns:
        the op's module.

    Raises:
        RuntimeError, OSError, ImportError, subprocess.CalledProcessError: it cannot be built or loaded here.
    """
    folder = Path(_get_build_directory(builder.name, verbose=False))
    with _one_at_a_time(folder) as ours:
        for needed in (folder, folder.with_name("pin_memory")):  # the second is loaded with that for asynchronous I/O
            _clear_dead_lock(needed / "lock", wait=not ours)
        return builder.load(verbose=False)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[bool]:
    """Hold minima's own build lock; yields whether any lock of PyTorch's that is found here must be a dead build's."""
    try:
        lock = os.open(folder.with_name("minima-lock"), os.O_WRONLY | os.O_CREAT)
    except OSError:  # a read-only folder, in which nobody builds
        yield False
        return
    try:
        yield _locked(lock, folder) and Path(sys.prefix) in folder.parents
    finally:
        os.close(lock)  # which frees it


def _locked(lock: int, folder: Path) -> bool:
    """Wait for the lock; False on a file system without locks."""
    began, said = time.monotonic(), False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not said and time.monotonic() - began > _SAY_AFTER_SECONDS:
                said = True
                logger.warning("an op of DeepSpeed is being built by another process, which is waited for (%s)", folder)
            time.sleep(0.05)
        except OSError:
            return False
        else:
            return True


def _clear_dead_lock(lock: Path, *, wait: bool) -> None:
    """Remove PyTorch's lock of a process that is gone.

    Args:
        wait: it may be that of a program which is not minima: wait until it goes, or is too old to be a living one's.
    """
    said = False
    while True:
        try:
            age_seconds = time.time() - lock.stat().st_mtime
        except OSError:  # there is none
            return
        if not wait or age_seconds > _LONGEST_BUILD_SECONDS:
            logger.warning("%s was left by a build that was killed: removed", lock)
            lock.unlink(missing_ok=True)
            return
        if not said:
            said = True
            logger.warning("DeepSpeed's op %s is being built by another program, which is waited for (%s)",
                           lock.parent.name, lock)  # fmt: skip
        time.sleep(0.2)

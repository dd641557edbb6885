"""Load DeepSpeed's compiled ops so that a killed build cannot block later processes."""

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
    """Load an op, and build it first if necessary.

    PyTorch's own lock is a file that exists in the op's folder while the op is built or loaded. A killed process leaves
    it behind, and later ones wait for it forever. So processes take turns under a lock of the kernel, which goes with
    its holder: a lock of PyTorch's that is found while holding ours is a dead process's.

    Args:
        builder: one of DeepSpeed's op builders.

    Returns:
        the op's module.

    Raises:
        RuntimeError, OSError, ImportError, subprocess.CalledProcessError: the op cannot be built or loaded here.
    """
    folder = Path(_get_build_directory(builder.name, verbose=False))
    with _one_at_a_time(folder) as ours:
        for needed in (folder, folder.with_name("pin_memory")):  # the op for asynchronous I/O loads the second
            _clear_dead_lock(needed / "lock", wait=not ours)
        return builder.load(verbose=False)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[bool]:
    """Hold minima's own build lock; yields whether a lock of PyTorch's that is found here must be a dead build's."""
    try:
        lock = os.open(folder.with_name("minima-lock"), os.O_WRONLY | os.O_CREAT)
    except OSError:  # a read-only folder, where nobody builds
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
                logger.warning("waiting for another process that builds or loads an op of DeepSpeed (%s)", folder)
            time.sleep(0.05)
        except OSError:
            return False
        else:
            return True


def _clear_dead_lock(lock: Path, *, wait: bool) -> None:
    """Remove a lock of PyTorch's whose process is gone.

    Args:
        wait: it may be another program's: wait until it goes, or is too old to belong to a live process.
    """
    said = False
    while True:
        try:
            age_seconds = time.time() - lock.stat().st_mtime
        except OSError:  # there is no lock
            return
        if not wait or age_seconds > _LONGEST_BUILD_SECONDS:
            logger.warning("removed %s, left behind by a killed build", lock)
            lock.unlink(missing_ok=True)
            return
        if not said:
            said = True
            logger.warning("waiting for another program that builds DeepSpeed's op %s (%s)",
                           lock.parent.name, lock)  # fmt: skip
        time.sleep(0.2)

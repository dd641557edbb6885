"""What the operating system refuses of a file (space, permission, a failing disk), as errors that say what to do."""

import errno
import os
import pwd
import re
import socket
import ssl
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minima.errors import AccessRefused, DiskFull, FileFailed, MinimaError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_HOME = "Could not determine home directory."  # pathlib's message for ~NAME
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
_DAMAGED = (errno.EBADMSG, errno.EUCLEAN)  # ext4 and XFS, of a block whose checksum is wrong
# A disk or a file server that fails, for this file or for this node alone, for now or for good.
_FAILING = (*_DAMAGED, errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.EREMOTEIO)
_MOVED = (errno.ENOENT, errno.ESTALE)
_OTHER_KIND = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP)
_OF_FILES = (*_FAILING, *_MOVED, *_OTHER_KIND)


def is_no_space(error: BaseException) -> bool:
    """Whether an error means that disk space, a quota or the maximum file size was exceeded.

    safetensors wraps the operating system's errors in its own class, with the errno in the message.
    """
    return _number(error) in _NO_SPACE


def _number(error: BaseException) -> int | None:
    """The operating system's number for an error; libraries in Rust have it in their text."""
    if isinstance(error, OSError):
        return error.errno
    number = re.search(r"os error (\d+)", str(error))
    return None if number is None else int(number[1])


def is_refused_file(error: BaseException) -> bool:
    """Whether the operating system refused a file for another reason than space or permission."""
    if isinstance(error, MinimaError | ssl.SSLError | socket.herror):  # the last two have numbers of their own
        return False
    name = error.filename if isinstance(error, OSError) else None
    if isinstance(name, str) and os.sep not in name and _number(error) == errno.ENOENT:
        return False  # a program that is not installed
    return _number(error) in _OF_FILES


def refused_file_advice(error: BaseException) -> str:
    """What to do about an error for which `is_refused_file` holds."""
    number = _number(error)
    if number in _MOVED:
        return "put back what was moved or removed, or mount its file system again"
    if number in _OTHER_KIND:
        return "move away what lies there: a file in a folder's place, a folder in a file's, or somebody's link"
    return "check the disk or the file server that it is on (`dmesg` may say more)"


def is_damage(error: OSError) -> bool:
    """Whether an error says that a file's bytes are no longer what was written."""
    return error.errno in _DAMAGED


def is_failing(error: BaseException) -> bool:
    """Whether an error is that of a disk or a file server, which another node or a later start may not have."""
    return isinstance(error, OSError) and error.errno in _FAILING


@contextmanager
def file_named(path: Path) -> Iterator[None]:
    """Add the path to an OSError from an open file; the system names a file only when opening or renaming it."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextmanager
def disk_full_named(folder: Path) -> Iterator[None]:
    """Turn "no space" errors raised inside the block into one that says what to do.

    Raises:
        DiskFull: disk space, a quota or the maximum file size was exceeded.
    """
    try:
        yield
    except MinimaError:  # already clear, perhaps from an inner block that knows the folder better
        raise
    except Exception as error:
        if not is_no_space(error):
            raise
        raise DiskFull(
            f"no space left while writing {folder} ({error})",
            "nothing half-finished is published; what was finished before is intact",
            "free some space (the dry run says how much is needed) or give the run another output folder, then run the "
            "same command again",
        ) from error


@contextmanager
def access_refused_named() -> Iterator[None]:
    """Turn "permission denied" and "read-only file system" into an error that names the file's owner.

    Raises:
        AccessRefused: reading or writing a file inside the block was not permitted.
        MinimaError: a path begins with `~` or `~NAME`, and that home folder is unknown.
    """
    try:
        yield
    except RuntimeError as error:
        if str(error) != _NO_HOME:
            raise
        raise MinimaError(
            "a path begins with ~, and the home folder it stands for is unknown: either the name after it is not a "
            "user of this machine, or HOME is not set and this process's user has no home folder",
            "~NAME stands for the home folder of NAME, and ~ alone for your own",
            "write the path in full",
        ) from error
    except OSError as error:
        if error.errno not in _NO_ACCESS or error.filename is None:
            raise
        raise AccessRefused(
            f"{error.filename}: {error.strerror}{_ownership(Path(os.fsdecode(error.filename)))}",
            "minima has to read or write it; nothing that was finished has changed",
            "ask its owner for access (`chmod -R g+rwX FOLDER` for a group's folder, and umask 002 from then on), "
            "or write elsewhere with output=PATH",
        ) from error


@contextmanager
def file_errors_named() -> Iterator[None]:
    """Turn whatever the operating system refuses of a file, except for space, into an error that names it.

    Raises:
        FileFailed: something inside could not use a file.
        AccessRefused: it may not.
        MinimaError: see `access_refused_named`.
    """
    try:
        with access_refused_named():
            yield
    except Exception as error:
        if not is_refused_file(error):
            raise
        raise FileFailed(
            str(error),
            "minima has to read or write it; nothing that was finished has changed",
            f"{refused_file_advice(error)}, then run the same command again",
        ) from error


def _ownership(path: Path) -> str:
    """The owner and mode of the path, or of its nearest accessible parent, and this process's user, as text."""
    for place in (path, *path.parents):
        try:
            facts = place.stat()
        except OSError:
            continue
        named = "it" if place == path else str(place)
        mode = stat.filemode(facts.st_mode)
        return f" ({named} belongs to {_user(facts.st_uid)}, {mode}; this process runs as {_user(os.geteuid())})"
    return ""


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:  # for example in a container
        return f"user {number}"

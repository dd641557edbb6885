"""File helpers: atomic writes, and clear errors for what the operating system refuses (disk full, no permission)."""

import errno
import hashlib
import json
import os
import platform
import pwd
import re
import resource
import shutil
import socket
import ssl
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from minima.errors import AccessRefused, DiskFull, FileFailed, MinimaError, StoreCorrupted

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # for folders, on some network and FUSE file systems
_NO_HOME = "Could not determine home directory."  # pathlib's message for ~NAME
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
_DAMAGED = (errno.EBADMSG, errno.EUCLEAN)  # ext4 and XFS, of a block whose checksum is wrong
# A disk or a file server that fails, for this file or for this node alone, for now or for good.
_FAILING = (*_DAMAGED, errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.EREMOTEIO)
_MOVED = (errno.ENOENT, errno.ESTALE)
_OTHER_KIND = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP)
_OF_FILES = (*_FAILING, *_MOVED, *_OTHER_KIND)
# The most that a process may need: a rank has a connection to every other one for each of several groups, and a merge
# two or three files for each part of each source.
OPEN_FILES = 1 << 16


def raise_file_limit() -> None:
    """Raise the limit on open files, usually 1,024 by default, as far as the system allows (at most OPEN_FILES)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # some systems enforce a lower limit than they report
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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
        return "move away what lies there: a file is in a folder's place, or a folder in a file's"
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


def inside(folder: Path, name: Any) -> Path:
    """The path of a file named by an index or manifest in `folder`; such names are untrusted input.

    Raises:
        StoreCorrupted: the path is outside the folder.
    """
    path = PurePosixPath(name) if isinstance(name, str) and name else None
    if path is None or path.is_absolute() or ".." in path.parts or "\0" in str(path):
        raise StoreCorrupted(
            f"an index in {folder} names the file {name!r}",
            "an index may only name files in its own folder; this would read or change something else",
            f"fetch or build {folder} again, from a source you trust",
        )
    return folder / path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with file_named(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_fault(path: Path, size: int, sha256: str | None = None) -> str:
    """How a file differs from what was written; empty if it does not. Content is compared only if `sha256` is given."""
    if not path.is_file():
        return "is missing"
    if (found_size := path.stat().st_size) != size:
        return f"has {found_size} bytes, but {size} were written"
    if sha256 is not None and (found := file_sha256(path)) != sha256:
        return f"has sha256 {found}, but {sha256} was written"
    return ""


def json_sha256(content: Any) -> str:
    """SHA-256 of content as JSON, whatever the order of its keys. Files contain such hashes, so it must not change."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def last_bytes(path: Path, count: int) -> bytes:
    """The last `count` bytes of a file; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - count))
            return file.read()
    except OSError:
        return b""


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically: the whole file or nothing."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically, in UTF-8 if it is text: the whole file or nothing, even after a power cut."""
    # unique to this process on this machine, because another one may write the same file
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    try:
        with file_named(path), temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def sync(path: Path) -> None:
    """Flush a file's content to disk, or a folder's entries if the file system supports that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with file_named(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def copy_content(source: Path, target: Path) -> None:
    """Copy the contents of a folder's files, without their modes and times.

    Unlike `shutil.copytree`: the source may be read-only, and the target may have been created by another user, who
    alone may change its modes and times.

    Raises:
        FileNotFoundError: the source is not a folder.
    """
    if not source.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(source))
    for path in sorted(source.rglob("*")):
        if path.is_file():
            copied = target / path.relative_to(source)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)


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


@contextmanager
def whole_or_gone(folder: Path) -> Iterator[None]:
    """Delete the folder before the block writes it, and again if the block fails.

    Raises:
        DiskFull: there is no space for it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with disk_full_named(folder):
            yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise

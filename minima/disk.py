"""What the operating system refuses of files, told as what it is: a full disk, somebody else's file."""

import errno
import hashlib
import json
import os
import platform
import pwd
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from minima.errors import AccessRefused, DiskFull, FileFailed, MinimaError, StoreCorrupted

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # of folders, on some network and FUSE file systems
_NO_HOME = "Could not determine home directory."  # what pathlib says of ~NAME
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
# A bad sector, or a block whose checksum the file system finds wrong (ext4 and XFS: EBADMSG, EUCLEAN).
_UNREADABLE = (errno.EIO, errno.EBADMSG, errno.EUCLEAN)
_MOVED = (errno.ENOENT, errno.ESTALE)
_OTHER_KIND = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP)
_OF_FILES = (*_UNREADABLE, *_MOVED, *_OTHER_KIND, errno.ENXIO, errno.ENODEV, errno.EREMOTEIO)


def is_no_space(error: BaseException) -> bool:
    """Whether an error says that space, quota or file size ran out.

    safetensors wraps the operating system's errors in a class of its own, with the number in its text.
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
    number = _number(error)
    if isinstance(error, MinimaError) or number is None or number in _NO_SPACE or number in _NO_ACCESS:
        return False
    return number in _OF_FILES or (isinstance(error, OSError) and error.filename is not None)


def refused_file_advice(error: BaseException) -> str:
    """What to do about an error for which `is_refused_file` holds."""
    number = _number(error)
    if number in _MOVED:
        return "put back what was moved or removed, or mount its file system again"
    if number in _OTHER_KIND:
        return "move away what lies there: a file is in a folder's place, or a folder in a file's"
    return "check the disk or the file server that it is on (`dmesg` may say more)"


def is_unreadable(error: OSError) -> bool:
    """Whether an error says that the disk cannot return the bytes that it was given."""
    return error.errno in _UNREADABLE


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
    """The file that an index or a manifest in `folder` names. Such files can come from anywhere.

    Raises:
        StoreCorrupted: the name leads out of the folder.
    """
    path = PurePosixPath(name) if isinstance(name, str) and name else None
    if path is None or path.is_absolute() or ".." in path.parts or "\0" in str(path):
        raise StoreCorrupted(
            f"an index in {folder} names the file {name!r}",
            "what an index names lies beside it; this would read or change something else",
            f"fetch or make {folder} again, from somebody you trust",
        )
    return folder / path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with file_named(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(content: Any) -> str:
    """SHA-256 of content as JSON, whatever the order of its keys. Files carry theirs, so it never changes."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that it is there whole or not at all."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut.

    Args:
        path: its folder exists; an earlier file is replaced.
        content: bytes, or text that becomes UTF-8.
    """
    # of this process on this machine: another one may write the same file
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
    """Make what a file holds last, or the names in a folder, where its file system knows of that."""
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
    """Copy what the files of a folder hold, and not whose they are.

    Unlike `shutil.copytree` it leaves modes and times alone: the source may be read-only, and the target may have been
    begun by somebody else, who alone may change them.

    Raises:
        FileNotFoundError: the source is no folder.
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
    """Turn "no space" errors into one that says what to do.

    Raises:
        DiskFull: something inside ran out of space, quota or file size.
    """
    try:
        yield
    except MinimaError:  # named already, perhaps by one of these further in, which knows the folder better
        raise
    except Exception as error:
        if not is_no_space(error):
            raise
        raise DiskFull(
            f"no space left while writing {folder} ({error})",
            "nothing half-finished is published, and what was finished before still is",
            "free some space (the dry run says how much is needed) or give the run another output folder, then run the "
            "same command again",
        ) from error


@contextmanager
def access_refused_named() -> Iterator[None]:
    """Turn "permission denied" and "read-only file system" into an error that says whose the file is.

    Raises:
        AccessRefused: something inside may not read or write a file.
        MinimaError: a path begins with the home of somebody who is not known here.
    """
    try:
        yield
    except RuntimeError as error:
        if str(error) != _NO_HOME:
            raise
        raise MinimaError(
            "a path begins with ~, and no home folder is known for it: either the name behind it is no user's of this "
            "machine, or HOME is not set and this process's user has none",
            "~NAME stands for the home folder of NAME, and ~ alone for one's own",
            "write the path out",
        ) from error
    except OSError as error:
        if error.errno not in _NO_ACCESS or error.filename is None:
            raise
        raise AccessRefused(
            f"{error.filename}: {error.strerror}{_ownership(Path(os.fsdecode(error.filename)))}",
            "minima has to read or write it; nothing that was finished has changed",
            "have its owner open it to you (`chmod -R g+rwX FOLDER` for a group's folder, and umask 002 from then on), "
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
    """Whose the nearest thing on the path is that can be looked at, and who asks."""
    for place in (path, *path.parents):
        try:
            facts = place.stat()
        except OSError:
            continue
        named = "it" if place == path else str(place)
        mode = stat.filemode(facts.st_mode)
        return f" ({named} is {_user(facts.st_uid)}'s, {mode}; this process is {_user(os.geteuid())}'s)"
    return ""


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:  # in a container, say
        return f"user {number}"


@contextmanager
def whole_or_gone(folder: Path) -> Iterator[None]:
    """Begin without the folder, and leave none behind when writing it fails.

    Raises:
        DiskFull: no space for it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with disk_full_named(folder):
            yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise

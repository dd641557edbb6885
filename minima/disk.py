"""Files: written whole or not at all, read with their checksums."""

import errno
import hashlib
import json
import os
import platform
import resource
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from minima.disk_errors import disk_full_named, file_named
from minima.errors import StoreCorrupted

_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # for folders, on some network and FUSE file systems
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
        with file_named(path), open(temporary, "wb", opener=no_link) as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def no_link(name: str, flags: int) -> int:
    """Open a file, but no symbolic link, with which another user of the folder could choose what is overwritten."""
    return os.open(name, flags | os.O_NOFOLLOW, 0o666)


def own_temporary_folder(name: str) -> Path:
    """A temporary folder that only this user can write to: of this name, or, if that is another's, new at each call."""
    folder = Path(tempfile.gettempdir(), name)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    facts = folder.lstat()
    own = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & 0o022
    return folder if own else Path(tempfile.mkdtemp(prefix=f"{name}-"))


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

"""A full disk, told as what it is."""

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from minima.errors import DiskFull, MinimaError, StoreCorrupted

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_no_space(error: BaseException) -> bool:
    """Whether an error says that space, quota or file size ran out.

    safetensors wraps the operating system's errors in a class of its own, with the number in its text.
    """
    if isinstance(error, OSError):
        return error.errno in _NO_SPACE
    number = re.search(r"os error (\d+)", str(error))
    return number is not None and int(number[1]) in _NO_SPACE


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

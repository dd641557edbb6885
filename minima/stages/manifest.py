"""A stage folder's state: `started.json` is written before the work, `manifest.json` after everything else."""

import json
import os
import time
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import minima
from minima.disk import write_json
from minima.disk_errors import is_failing
from minima.errors import FileFailed, StageError

FINISHED, STARTED = "manifest.json", "started.json"
_VERSIONS = ("torch", "deepspeed", "transformers", "datasets", "sentencepiece", "numpy")
# NFS caches "no such file" for as long as a folder's attributes, by default 60 s at most (nfs(5), acdirmax).
NFS_SECONDS = 60.0
_POLL_SECONDS = 0.5


def is_finished(folder: Path) -> bool:
    """Whether the stage in this folder has published its manifest."""
    return (folder / FINISHED).is_file()


def is_begun(folder: Path) -> bool:
    """Whether a stage has written anything besides its `started.json`; hidden files are incomplete and do not count."""
    return (folder / STARTED).is_file() and any(
        not path.name.startswith(".") and path.name != STARTED for path in folder.iterdir()
    )


def wait_finished(folder: Path, seconds: float) -> bool:
    """Whether a stage is finished; waits up to `seconds` for another machine's result to become visible here.

    Args:
        seconds: how long to wait; 0 checks once.
    """
    until = time.monotonic() + seconds
    while True:
        look_again(folder)
        if is_finished(folder):
            return True
        if time.monotonic() >= until:
            return False
        time.sleep(_POLL_SECONDS)


def look_again(folder: Path) -> None:
    """List a folder and its parent, which clears a cached "no such file" on NFS."""
    for path in (folder.parent, folder):
        with suppress(OSError):  # missing or not readable: the next access reports it
            os.listdir(path)


def read_manifest(folder: Path, name: str = FINISHED) -> dict[str, Any]:
    """A stage's manifest (or its `started.json`).

    Raises:
        StageError: it is missing or not JSON.
    """
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it contains a {type(content).__name__}, not an object")
        return content
    except (FileNotFoundError, NotADirectoryError):
        raise _not_made(folder, name) from None
    except (OSError, ValueError) as error:
        raise _unreadable(folder, name, error) from None


def _not_made(folder: Path, name: str) -> StageError:
    keeps = f"; it resumes from what {folder} contains" if folder.is_dir() else ""
    return StageError(
        f"stage {folder.name!r} is not {'finished' if name == FINISHED else 'started'}: {folder / name} is missing",
        "whatever reads the stage would start without its input",
        f"run it first (minima run RECIPE --stages {folder.name}){keeps}",
    )


def _unreadable(folder: Path, name: str, error: OSError | ValueError) -> StageError:
    do = f"remove this one file and run the stage again: it resumes from the rest of {folder}"
    if isinstance(error, OSError):
        do = "make sure that you have permission to read it and that its disk responds"
    elif name == STARTED:  # without it, nobody can tell whether the folder is what the recipe asks for
        saved = ", and the checkpoints in it are lost" if (folder / "checkpoints").is_dir() else ""
        do = f"restore it from a copy, or remove the folder {folder}: the stage then starts again{saved}"
    return (FileFailed if is_failing(error) else StageError)(
        f"{folder / name} cannot be read ({error})", "it says what the folder contains and what it was made from", do
    )


def write_started(folder: Path, description: dict[str, Any]) -> None:
    """Record what is about to be made in the folder. Keeps the first start's time and the duration of earlier starts.

    `earlier_seconds` is the total work of earlier starts, each counted from its beginning to its last written file: a
    start that was killed cannot report more, and what it did after that file is lost and done again.
    """
    now = time.time()
    content = description | {"versions": versions(), "started": _now(), "began": now, "earlier_seconds": 0.0}
    if (folder / STARTED).is_file():
        before = read_manifest(folder, STARTED)
        began = before.get("began", now)
        worked = max(0.0, _last_write(folder, began) - began)
        content["started"] = before.get("started", content["started"])
        content["earlier_seconds"] = round(before.get("earlier_seconds", 0.0) + worked, 3)
    write_json(folder / STARTED, content)


def write_manifest(folder: Path, metrics: dict[str, Any], seconds: float) -> None:
    """Publish a stage by writing the last file of its folder.

    The manifest's `seconds` cover the work of all starts: see `write_started` for those that ended early.

    Args:
        folder: the stage's folder, with its `started.json`.
        seconds: duration of work since the stage was last started.
    """
    started = read_manifest(folder, STARTED)
    seconds = round(started.get("earlier_seconds", 0.0) + seconds, 3)
    result = {"versions": versions(), "metrics": metrics, "seconds": seconds, "finished": _now()}
    write_json(folder / FINISHED, started | result)


def versions() -> dict[str, str]:
    """Versions of minima and of the packages that its results depend on, found without importing them."""
    found = {"minima": minima.__version__}
    for name in _VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _last_write(folder: Path, default: float) -> float:
    """Modification time of the newest file or folder in a stage's folder, other than its `started.json`.

    Of checkpoints only the newest is searched: a long run may keep hundreds of them, with files of every rank.
    """
    checkpoints, files = folder / "checkpoints", list[Path]()
    for path in folder.iterdir():
        if path == checkpoints:
            newest = max(path.iterdir(), key=lambda each: each.stat().st_mtime, default=path)
            files += [newest, *newest.rglob("*")]
        else:
            files += path.rglob("*") if path.is_dir() else [path]
    return max((file.stat().st_mtime for file in files if file.name != STARTED), default=default)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

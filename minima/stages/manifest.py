"""What a stage folder promises: `started.json` before the work, `manifest.json` as the last thing written."""

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
from minima.errors import StageError

FINISHED, STARTED = "manifest.json", "started.json"
_VERSIONS = ("torch", "deepspeed", "transformers", "datasets", "sentencepiece", "numpy")
# NFS keeps "no such file" for as long as a folder's attributes, by default 60 s at most (nfs(5), acdirmax).
NFS_SECONDS = 60.0
_POLL_SECONDS = 0.5


def is_finished(folder: Path) -> bool:
    """Whether the stage of this folder has published its manifest."""
    return (folder / FINISHED).is_file()


def is_begun(folder: Path) -> bool:
    """Whether a stage has left something beside its `started.json`; hidden files are half-written and do not count."""
    return (folder / STARTED).is_file() and any(
        not path.name.startswith(".") and path.name != STARTED for path in folder.iterdir()
    )


def wait_finished(folder: Path, seconds: float) -> bool:
    """Whether a stage that another machine may have finished is so, or gets so within some seconds.

    Args:
        folder: the stage's.
        seconds: to wait; 0 looks once.
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
    """List a folder and what holds it: on NFS that ends a remembered "no such file"."""
    for path in (folder.parent, folder):
        with suppress(OSError):  # not there, or not ours to list: what is asked for next says so
            os.listdir(path)


def read_manifest(folder: Path, name: str = FINISHED) -> dict[str, Any]:
    """A stage's manifest (or its `started.json`).

    Raises:
        StageError: it is missing or not JSON.
    """
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, no object")
        return content
    except (FileNotFoundError, NotADirectoryError):
        raise _not_made(folder, name) from None
    except (OSError, ValueError) as error:
        raise _unreadable(folder, name, error) from None


def _not_made(folder: Path, name: str) -> StageError:
    keeps = f"; it goes on from what {folder} holds" if folder.is_dir() else ""
    return StageError(
        f"stage {folder.name!r} is not {'finished' if name == FINISHED else 'begun'}: {folder / name} is not there",
        "what reads the stage would start without it",
        f"run it first (minima run RECIPE --stages {folder.name}){keeps}",
    )


def _unreadable(folder: Path, name: str, error: OSError | ValueError) -> StageError:
    do = f"remove this one file and run the stage again: it goes on from what else {folder} holds"
    if isinstance(error, OSError):
        do = "see to it that you may read it and that its disk answers"
    elif name == STARTED:  # without it nobody knows whether what lies there is what the recipe asks for
        saved = ", and the checkpoints in it are lost" if (folder / "checkpoints").is_dir() else ""
        do = f"put a copy of it back; or remove the folder {folder}: the stage begins again{saved}"
    return StageError(
        f"{folder / name} cannot be read ({error})", "it says what the folder holds and what it was made from", do
    )


def write_started(folder: Path, description: dict[str, Any]) -> None:
    """Say what is being made here, before the first byte of it. Keeps the time and the work of earlier starts.

    `earlier_seconds` sums what earlier starts worked, each from its beginning to the last file that it left: a start
    that was killed could not say more, and what it did after that was lost and is done again.
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
    """Publish a stage: the last thing that is written into its folder.

    Its `seconds` are of work over all starts: see `write_started` for those that ended early.

    Args:
        folder: the stage's folder, with its `started.json`.
        metrics: what the stage measured.
        seconds: of work since the stage was last started.
    """
    started = read_manifest(folder, STARTED)
    seconds = round(started.get("earlier_seconds", 0.0) + seconds, 3)
    write_json(
        folder / FINISHED,
        started | {"versions": versions(), "metrics": metrics, "seconds": seconds, "finished": _now()},
    )


def versions() -> dict[str, str]:
    """Versions of minima and of what its results depend on, without importing any of it."""
    found = {"minima": minima.__version__}
    for name in _VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _last_write(folder: Path, default: float) -> float:
    """When the newest file below a stage's folder was written, beside its `started.json`."""
    files = (path for path in folder.rglob("*") if path.name != STARTED and path.is_file())
    return max((path.stat().st_mtime for path in files), default=default)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

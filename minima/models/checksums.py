"""Sizes and checksums of a stage's weights and scores: `checksums.json` in its folder. No torch.

Checkpoints and token stores have checksums of their own. Configurations, cards and tokenizers are not covered, because
those of an exported model may be edited by hand.
"""

import json
from pathlib import Path
from typing import Any

from minima.disk import file_sha256, inside, write_json
from minima.errors import StoreCorrupted

CHECKSUMS = "checksums.json"
WEIGHTS, SCORES = "model/", "scores.safetensors"  # each can be verified on its own
_FORMAT = "minima-checksums-1"  # tells our file from one of the same name in somebody else's model folder
_KEPT = (f"{WEIGHTS}*.safetensors", f"{WEIGHTS}*.safetensors.index.json", SCORES)


def write_checksums(folder: Path) -> None:
    """Record `bytes` and `sha256` of a stage's weights and scores; the last step before its manifest is written.

    Args:
        folder: the stage's; nothing is written if it has neither.
    """
    files = sorted(path for pattern in _KEPT for path in folder.glob(pattern) if path.is_file())
    found = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files
    }
    if found:
        write_json(folder / CHECKSUMS, {"format": _FORMAT, "files": found})


def missing_files(folder: Path) -> list[str]:
    """Recorded files of a finished stage that no longer exist; the content of the others is not checked.

    Raises:
        StoreCorrupted: the checksums themselves are damaged.
    """
    return [name for name in _read(folder) if not inside(folder, name).is_file()]


def verify_files(folder: Path, prefix: str, part: int = 0, parts: int = 1) -> None:
    """Check the files of a finished stage against their checksums; a folder without checksums is accepted as it is.

    Args:
        folder: the stage's, or any other.
        prefix: check only files whose names begin with it: WEIGHTS or SCORES.
        part: check only files whose index modulo `parts` is this, so that ranks can share the reading.
        parts: the number of ranks that share it.

    Raises:
        StoreCorrupted: a file is missing or was changed; the message names it.
        PermissionError: a file may not be read.
    """
    wanted = [(name, facts) for name, facts in _read(folder).items() if name.startswith(prefix)]
    for name, facts in wanted[part::parts]:
        path = inside(folder, name)
        if not path.is_file():
            raise _damaged(folder, path, "is missing")
        if (size := path.stat().st_size) != facts["bytes"]:
            raise _damaged(folder, path, f"has {size} bytes, but {facts['bytes']} were written")
        if (found := file_sha256(path)) != facts["sha256"]:
            raise _damaged(folder, path, f"is damaged: its SHA-256 is {found}, but {facts['sha256']} was written")


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / CHECKSUMS
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("format", _FORMAT) != _FORMAT:
            return {}
        found: dict[str, dict[str, Any]] = content["files"]
        whole = all(isinstance(one["bytes"], int) and isinstance(one["sha256"], str) for one in found.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if not (folder / "manifest.json").is_file():  # not a stage of minima, so the file is somebody else's
            return {}
        raise _damaged(folder, path, f"cannot be read ({type(error).__name__}: {error})") from None
    if not whole:
        raise _damaged(folder, path, "does not give the size and the checksum of each file")
    return found


def _damaged(folder: Path, path: Path, how: str) -> StoreCorrupted:
    return StoreCorrupted(
        f"{path} {how}",
        f"{folder} is a finished stage, and later stages would continue from something other than its results",
        f"restore the file, or remove {folder} and everything made from it, to make them again",
    )

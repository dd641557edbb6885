"""The weights and scores that a stage has left, with sizes and checksums: `checksums.json` in its folder. No torch.

Checkpoints and token stores have checksums of their own. Configurations, cards and tokenizers are not in it: those of
an exported model may be edited by hand.
"""

import json
from pathlib import Path
from typing import Any

from minima.disk import file_sha256, inside, write_json
from minima.errors import StoreCorrupted

CHECKSUMS = "checksums.json"
WEIGHTS, SCORES = "model/", "scores.safetensors"  # what may be looked at by itself
_FORMAT = "minima-checksums-1"  # a model's folder from elsewhere may have a file of this name
_KEPT = (f"{WEIGHTS}*.safetensors", f"{WEIGHTS}*.safetensors.index.json", SCORES)


def write_checksums(folder: Path) -> None:
    """Write down `bytes` and `sha256` of a stage's weights and scores, as the last thing before its manifest.

    Args:
        folder: the stage's; nothing is written where it has neither.
    """
    files = sorted(path for pattern in _KEPT for path in folder.glob(pattern) if path.is_file())
    found = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files
    }
    if found:
        write_json(folder / CHECKSUMS, {"format": _FORMAT, "files": found})


def missing_files(folder: Path) -> list[str]:
    """Files that a finished stage has left and that are not there any more; their content is not looked at.

    Raises:
        StoreCorrupted: the checksums themselves are damaged.
    """
    return [name for name in _read(folder) if not inside(folder, name).is_file()]


def verify_files(folder: Path, prefix: str, part: int = 0, parts: int = 1) -> None:
    """Compare what a finished stage has left with what it wrote; a folder without checksums is taken as it is.

    Args:
        folder: the stage's, or any other.
        prefix: what the names of the files begin with that are to be looked at: WEIGHTS or SCORES.
        part: look at every file whose number leaves this remainder, so that ranks can share the reading.
        parts: divisor.

    Raises:
        StoreCorrupted: a file is missing or another one; names it.
        PermissionError: a file may not be read.
    """
    wanted = [(name, facts) for name, facts in _read(folder).items() if name.startswith(prefix)]
    for name, facts in wanted[part::parts]:
        path = inside(folder, name)
        if not path.is_file():
            raise _damaged(folder, path, "is missing")
        if (size := path.stat().st_size) != facts["bytes"]:
            raise _damaged(folder, path, f"has {size} bytes, {facts['bytes']} were written")
        if (found := file_sha256(path)) != facts["sha256"]:
            raise _damaged(folder, path, f"is damaged: SHA-256 {found}, {facts['sha256']} was written")


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
        if not (folder / "manifest.json").is_file():  # no stage of minima's: somebody else's file
            return {}
        raise _damaged(folder, path, f"cannot be read ({type(error).__name__}: {error})") from None
    if not whole:
        raise _damaged(folder, path, "does not say the size and the checksum of each file")
    return found


def _damaged(folder: Path, path: Path, how: str) -> StoreCorrupted:
    return StoreCorrupted(
        f"{path} {how}",
        f"{folder} is a finished stage, and what reads it would go on from something else than it made",
        f"put the file back, or remove {folder} to make it again (with what was made from it)",
    )

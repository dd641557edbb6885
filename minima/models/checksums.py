"""The weights and scores that a stage has left, with sizes and checksums: `checksums.json` in its folder. No torch.

Checkpoints and token stores have checksums of their own. Configurations, cards and tokenizers are not in it: those of
an exported model may be edited by hand.
"""

import json
from pathlib import Path
from typing import Any

from minima.disk import file_sha256, inside
from minima.errors import StoreCorrupted

CHECKSUMS = "checksums.json"
_KEPT = ("model/*.safetensors", "model/*.safetensors.index.json", "scores.safetensors")


def write_checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Write down `bytes` and `sha256` of a stage's weights and scores, as the last thing before its manifest.

    Args:
        folder: the stage's.

    Returns:
        By path below the folder; nothing is written where it is empty.
    """
    files = sorted(path for pattern in _KEPT for path in folder.glob(pattern) if path.is_file())
    found = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files
    }
    if found:
        (folder / CHECKSUMS).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def missing_files(folder: Path) -> list[str]:
    """Files that a finished stage has left and that are not there any more; their content is not looked at."""
    return [name for name in _read(folder) if not inside(folder, name).is_file()]


def verify_files(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Compare what a finished stage has left with what it wrote; a folder without `checksums.json` is taken as it is.

    Args:
        folder: the stage's, or any other.
        part: look at every file whose number leaves this remainder, so that ranks can share the reading.
        parts: divisor.

    Raises:
        StoreCorrupted: a file is missing or another one; names it.
    """
    for name, wanted in list(_read(folder).items())[part::parts]:
        path = inside(folder, name)
        if not path.is_file():
            raise _damaged(folder, path, "is missing")
        if (size := path.stat().st_size) != wanted["bytes"]:
            raise _damaged(folder, path, f"has {size} bytes, {wanted['bytes']} were written")
        if (found := file_sha256(path)) != wanted["sha256"]:
            raise _damaged(folder, path, f"is damaged: SHA-256 {found}, {wanted['sha256']} was written")


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / CHECKSUMS
    if not path.is_file():
        return {}
    try:
        found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        whole = all(isinstance(one["bytes"], int) and isinstance(one["sha256"], str) for one in found.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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

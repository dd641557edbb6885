"""Checkpoints on disk: complete or absent, each file with its checksum."""

import json
import logging
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from minima.disk import file_sha256, inside, json_sha256
from minima.disk_errors import access_refused_named, is_damage
from minima.engine import distributed
from minima.errors import CheckpointError, FileFailed, StoreCorrupted
from minima.models.layout import MARKER, complete_steps, step_folder, step_of

FORMAT = "minima-checkpoint-1"
logger = logging.getLogger("minima.checkpoint")


def read_marker(checkpoint: Path) -> dict[str, Any]:
    """Read the marker of a complete checkpoint.

    Raises:
        CheckpointError: there is no complete checkpoint, or it is of another format.
        StoreCorrupted: the marker exists but is damaged.
        FileFailed: the marker cannot be read now, but may be intact.
        PermissionError: the marker may not be read.
    """
    try:
        facts = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        if not isinstance(facts, dict) or not isinstance(facts.get("format"), str):
            raise ValueError("it does not describe a checkpoint")
        own = facts.pop("marker_sha256", None)  # markers of earlier versions have none
        if own is not None and own != json_sha256(facts):
            raise ValueError("its content does not match its own checksum")
        if facts.get("format") == FORMAT:
            _check_facts(facts)
    except (ValueError, AttributeError, TypeError) as error:  # not text, not JSON, not an object, or altered
        raise _damaged_marker(checkpoint, f"is damaged: {error}") from error
    except PermissionError:  # unreadable is not incomplete
        raise
    except OSError as error:
        if isinstance(error, IsADirectoryError) or is_damage(error):
            how = "is a folder" if isinstance(error, IsADirectoryError) else f"is damaged: {error.strerror}"
            raise _damaged_marker(checkpoint, how) from error
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise _unread(checkpoint, checkpoint / MARKER, error) from error
        raise CheckpointError(
            f"{checkpoint} is not a complete checkpoint: {error}",
            "its marker is written last, so some of its files may be missing",
            "choose another step, or train again from an earlier one",
        ) from error
    if facts.get("format") != FORMAT:
        raise CheckpointError(
            f"{checkpoint} has format {facts.get('format')!r}, not {FORMAT!r}",
            "its files would be misread",
            "export it with the version of minima that wrote it",
        )
    return facts


def _check_facts(facts: dict[str, Any]) -> None:
    if not facts.get("sha256"):
        raise ValueError("it has no checksums")
    for key, kind in {"step": int, "ranks": int, "config": dict, "shapes": dict, "sha256": dict}.items():
        if key in facts and (not isinstance(facts[key], kind) or facts[key] == 0):
            raise ValueError(f"its {key!r} is {facts[key]!r}")


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint so that it no longer counts, replacing an earlier such copy. One rank calls it.

    Returns:
        Its new path.
    """
    aside = checkpoint.with_name(checkpoint.name + ".damaged")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(checkpoint, aside)
    return aside


def drop_after(folder: Path, step: int) -> None:
    """Remove the checkpoints after `step`. Every rank calls it, and none returns before they are gone.

    Raises:
        CheckpointError: one cannot be removed; on every rank.
    """
    with distributed.refused_together(lambda error: _cannot_remove(folder, step, error)):
        if distributed.is_main():
            for later in complete_steps(folder):
                if later > step:
                    remove(step_folder(folder, later))


def _cannot_remove(folder: Path, step: int, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"the checkpoints after step {step} in {folder} cannot be removed: {error}",
        f"step {step} has the best held-out loss, but the stage's newest checkpoint is the one that would be used",
        "give this user write access there, or remove them by hand, then run again: nothing is trained twice",
    )


def remove_old(folder: Path, keep: int, keep_every_steps: int = 0, spare: Collection[int] = ()) -> None:
    """Remove all but the newest complete checkpoints, and the remains of interrupted removals and saves.

    Args:
        folder: holds the stage's checkpoints.
        keep: how many of the newest stay; 0 keeps all.
        keep_every_steps: checkpoints at multiples of this many steps stay, too; 0 for none.
        spare: checkpoints at these steps stay, too.
    """
    steps = complete_steps(folder)
    kept = {*(steps[-keep:] if keep else steps), *spare}
    kept |= {step for step in steps if keep_every_steps and step % keep_every_steps == 0}
    for path in folder.glob("step-*"):
        step = step_of(path.name)
        if step is not None and path.is_dir() and step not in kept and (keep or not (path / MARKER).is_file()):
            try:
                remove(path)
            except OSError as error:  # no reason to end the training
                logger.warning("%s cannot be removed, so it stays: %s", path, error)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, if it is there."""
    (checkpoint / MARKER).unlink(missing_ok=True)  # first: a partial checkpoint must not pass for a complete one
    shutil.rmtree(checkpoint, ignore_errors=True)


def verify_together(checkpoint: Path, prefix: str = "") -> dict[str, Any]:
    """Compare the files whose names begin with `prefix` with their checksums; the ranks share the reading.

    Returns:
        The content of the marker.

    Raises:
        StoreCorrupted: on every rank, if one of them found a file missing or changed; names the file.
        AccessRefused: on every rank, if one of them may not read a file.
    """
    rank, ranks = distributed.share()
    with distributed.refused_together(), access_refused_named():
        facts = read_marker(checkpoint)
        files = sorted(name for name in facts["sha256"] if name.startswith(prefix))
        verify_checkpoint(checkpoint, files[rank::ranks])
    return facts


def verify_checkpoint(checkpoint: Path, files: list[str] | None = None) -> None:
    """Compare files with their checksums.

    Args:
        checkpoint: a complete checkpoint.
        files: names of the files to check; all if not given.

    Raises:
        StoreCorrupted: a file is missing, or its bytes have changed; names the file.
        FileFailed: a file cannot be read now, but may be intact; names the file.
        PermissionError: a file may not be read.
    """
    hashes = read_marker(checkpoint)["sha256"]
    for name in hashes if files is None else files:
        path = inside(checkpoint, name)
        try:
            found = file_sha256(path) if path.is_file() else "no file"
        except PermissionError:
            raise
        except OSError as error:
            if is_damage(error):
                raise _damaged(checkpoint, path, str(error.strerror)) from error
            raise _unread(checkpoint, path, error) from error
        if found != hashes[name]:
            raise _damaged(checkpoint, path, f"SHA-256 {found} instead of {hashes[name]}")


def _unread(checkpoint: Path, path: Path, error: OSError) -> FileFailed:
    return FileFailed(
        f"{path} cannot be read: {error.strerror or error}",
        "its checkpoint may be intact, and readable from another node, so it is neither skipped nor set aside",
        "check the file system that it is on, then run the same command again; if the file stays unreadable, remove "
        f"{checkpoint} to continue from the checkpoint before it",
    )


def _damaged_marker(checkpoint: Path, how: str) -> StoreCorrupted:
    return StoreCorrupted(
        f"{checkpoint / MARKER} {how}",
        "it lists the checkpoint's files and their checksums",
        f"remove {checkpoint} to continue from the checkpoint before it",
    )


def _damaged(checkpoint: Path, path: Path, how: str) -> StoreCorrupted:
    return StoreCorrupted(
        f"{path} is damaged: {how}",
        "training would continue from wrong numbers",
        f"remove {checkpoint} to continue from the checkpoint before it",
    )

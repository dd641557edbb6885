"""Checkpoints on disk: complete or not there, each file with its checksum."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from minima.disk import is_no_space
from minima.engine import distributed
from minima.errors import CheckpointError, DiskFull, MinimaError, StoreCorrupted

FORMAT = "minima-checkpoint-1"
MARKER = "checkpoint.json"  # written last: a checkpoint without it does not count


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies."""
    return folder / f"step-{step:08d}"


def complete_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, ascending."""
    found = folder.glob(f"step-*/{MARKER}") if folder.is_dir() else ()
    return sorted(int(path.parent.name[5:]) for path in found if path.parent.name[5:].isdigit())


def read_marker(checkpoint: Path) -> dict[str, Any]:
    """What a complete checkpoint says of itself.

    Raises:
        CheckpointError: there is no complete checkpoint, or it is of another format.
    """
    try:
        facts = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{checkpoint} is no complete checkpoint: {error}",
            "its marker is written last, so some of its files may be missing",
            "take another step, or train again from an earlier one",
        ) from error
    if facts.get("format") != FORMAT:
        raise CheckpointError(
            f"{checkpoint} has format {facts.get('format')!r}, not {FORMAT!r}",
            "its files would be misread",
            "export it with the version of minima that wrote it",
        )
    return facts


def write_checkpoint(
    folder: Path,
    step: int,
    write_files: Callable[[Path], list[Path]],
    facts: dict[str, Any],
    keep: int,
    spare: int | None = None,
) -> Path:
    """Write one checkpoint; every rank calls it, and none returns before it is complete.

    Args:
        folder: holds the stage's checkpoints.
        step: finished updates.
        write_files: writes this rank's files into the folder that it is given, and returns them.
        facts: what the marker says besides format and checksums; rank 0's is taken.
        keep: how many of the newest stay; 0 keeps all.
        spare: the checkpoint after this step stays, too.

    Returns:
        The checkpoint's folder.

    Raises:
        DiskFull: no space is left. The checkpoints that were complete before still are.
    """
    final = step_folder(folder, step)
    partial = final.with_name(final.name + ".partial")
    failure: str | None = None
    full, hashes = False, {}
    try:
        if distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    except OSError as error:
        failure, full = str(error), is_no_space(error)
    distributed.raise_together(None if failure is None else _cannot_write(partial, [failure], full))
    try:
        for path in write_files(partial):
            _sync(path)
            hashes[path.name] = file_sha256(path)
    except (OSError, SafetensorError) as error:
        failure, full = str(error), is_no_space(error)
    reports = distributed.gather_objects((failure, full, hashes))  # also the barrier after the last file
    failures = [f"rank {rank}: {report[0]}" for rank, report in enumerate(reports) if report[0] is not None]
    full = any(report[1] for report in reports)
    if not failures and distributed.is_main():
        try:
            _complete(partial, final, facts, {name: digest for *_, files in reports for name, digest in files.items()})
        except OSError as error:
            failures, full = [f"rank 0: {error}"], is_no_space(error)
    failures, full = distributed.broadcast_object((failures, full))
    if failures:
        if distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        raise _cannot_write(partial, failures, full)
    if distributed.is_main():
        _prune(folder, keep, spare)
    return final


def drop_after(folder: Path, step: int) -> None:
    """Remove the checkpoints after `step`; every rank calls it, and none returns before they are gone."""
    if distributed.is_main():
        for later in complete_steps(folder):
            if later > step:
                _remove(step_folder(folder, later))
    distributed.barrier()


def _complete(partial: Path, final: Path, facts: dict[str, Any], hashes: dict[str, str]) -> None:
    marker = partial / MARKER
    marker.write_text(json.dumps({"format": FORMAT, **facts, "sha256": hashes}, indent=1), encoding="utf-8")
    _sync(marker)
    _remove(final)  # the same step, saved before a run went back to an earlier one
    partial.rename(final)
    _sync(final.parent)


def _cannot_write(partial: Path, failures: list[str], full: bool) -> MinimaError:
    why = "the run cannot go on without a place for its checkpoints; those that were complete before still are"
    if full:
        return DiskFull(
            f"no space left for {partial}: {'; '.join(failures)}",
            why,
            "free some space (or lower keep_checkpoints), then run again: it resumes from its last checkpoint",
        )
    return CheckpointError(
        f"{partial} could not be written: {'; '.join(failures)}", why, "mend the cause, then run again"
    )


def _prune(folder: Path, keep: int, spare: int | None) -> None:
    """Remove all but the newest complete ones, and what a removal or a save that was cut short has left."""
    kept = {*(complete_steps(folder)[-keep:] if keep else complete_steps(folder)), spare}
    for path in folder.glob("step-*"):
        number = path.name.removesuffix(".partial")[5:]
        if number.isdigit() and int(number) not in kept and (keep or not (path / MARKER).is_file()):
            _remove(path)


def _remove(checkpoint: Path) -> None:
    (checkpoint / MARKER).unlink(missing_ok=True)  # first: half of a checkpoint must not pass for a whole one
    shutil.rmtree(checkpoint, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_together(checkpoint: Path, prefix: str = "") -> None:
    """Compare the files whose names begin with `prefix` with their checksums; the ranks share the reading.

    Raises:
        StoreCorrupted: on every rank, when one of them found a file that is missing or changed; names it.
    """
    rank, ranks = distributed.share()
    error: MinimaError | None = None
    try:
        files = sorted(name for name in read_marker(checkpoint)["sha256"] if name.startswith(prefix))
        verify_checkpoint(checkpoint, files[rank::ranks])
    except MinimaError as found:
        error = found
    distributed.raise_together(error)


def verify_checkpoint(checkpoint: Path, files: list[str] | None = None) -> None:
    """Compare files with their checksums.

    Args:
        checkpoint: a complete checkpoint.
        files: names to look at; all when not given.

    Raises:
        StoreCorrupted: a file is missing or its bytes have changed; names it.
    """
    hashes = read_marker(checkpoint)["sha256"]
    for name in hashes if files is None else files:
        path = checkpoint / name
        found = file_sha256(path) if path.is_file() else "no file"
        if found != hashes[name]:
            raise StoreCorrupted(
                f"{path} is damaged: SHA-256 {found} instead of {hashes[name]}",
                "training would go on from wrong numbers",
                f"remove {checkpoint} to go on from the checkpoint before it",
            )

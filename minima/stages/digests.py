"""Short hashes of a run's external inputs: files, model folders and text sources. No torch."""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from minima.models.layout import MARKER, complete_steps, step_folder
from minima.recipe.data import Source, files_below

# A file's hash covers its size, both ends and samples in between, so at most some 3 MiB are read. A model that was
# trained further differs everywhere; a change of a few bytes in the middle of a large file can go unnoticed.
_EDGE_BYTES = 1 << 20
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16
_AT_ONCE = 16  # files read at the same time: a corpus may have ten thousand, on a disk that takes its time for each


def digest(content: Any) -> str:
    """Hash of any JSON-serialisable content; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


def file_digest(path: Path) -> str:
    """Hash of a file's size, its first and last mebibyte, and evenly spaced samples between them."""
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    inside = size - 2 * _EDGE_BYTES
    with open(path, "rb") as file:
        found.update(file.read(_EDGE_BYTES))
        for number in range(_SAMPLES if inside > 0 else 0):
            file.seek(_EDGE_BYTES + inside * number // _SAMPLES)
            found.update(file.read(_SAMPLE_BYTES))
        file.seek(max(_EDGE_BYTES, size - _EDGE_BYTES))
        found.update(file.read(_EDGE_BYTES))
    return found.hexdigest()[:32]


def folder_digest(folder: Path) -> str:
    """Hash of a folder's files by name and content, be it a model, a token store or anything else; also of a file.

    It covers the files directly in the folder and what other stages read from a stage's folder: `model/`,
    `tokenizer/`, the newest complete checkpoint (through its marker, which has the checksum of each file), and each
    token store (through its index, which has the checksums of all its files).
    """
    if not folder.is_dir():
        return file_digest(folder)
    inside = [file for name in ("model", "tokenizer") if (folder / name).is_dir() for file in (folder / name).iterdir()]
    inside += [folder / split / "index.json" for split in ("train", "held_out")]
    checkpoints = folder / "checkpoints"
    inside += [step_folder(checkpoints, step) / MARKER for step in complete_steps(checkpoints)[-1:]]
    return _files_digest([*folder.iterdir(), *inside], folder)


def source_digest(source: Source) -> str:
    """Hash of a source's files; for a data set on the Hub, of its settings in the recipe."""
    if source.path is not None:
        return _files_digest(source.files())
    if source.hub is not None and (folder := Path(source.hub).expanduser()).is_dir():
        return _files_digest(files_below(folder))
    return digest(source.model_dump(mode="json", exclude_defaults=True))


def former_source_digest(source: Source) -> str | None:
    """The hash of a glob pattern as earlier versions computed it, including hidden files; None if not applicable."""
    if source.path is None or (path := Path(source.path).expanduser()).exists():
        return None
    files = [file for file in Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))) if file.is_file()]
    return _files_digest(files) if files else None


def is_gone(source: Source) -> bool:
    """Whether the files of a source are no longer on this machine."""
    return source.path is not None and not source.files()


def _files_digest(paths: Iterable[Path], base: Path | None = None) -> str:
    """Hash of files by content and name: the bare file name, or the path relative to `base` if given."""
    named = {file: file.name if base is None else str(file.relative_to(base)) for file in paths if file.is_file()}
    files = sorted(named)
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return digest(
            [(named[file], found) for file, found in zip(files, threads.map(file_digest, files), strict=True)]
        )

"""What a stage leaves for others to read, with sizes and checksums: `checksums.json` in its folder. No torch.

It covers the weights, scores, configuration and tokenizer. For a training stage it also names the checkpoint that is
the stage's result, by its marker, which has the checksums of that checkpoint's files. Token stores have checksums of
their own. Of an export only the weights are checked, because people may edit its configuration, tokenizer and card.
"""

import json
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from minima.disk import file_fault, file_sha256, inside, write_json
from minima.errors import StoreCorrupted
from minima.models.layout import MARKER, TOKENIZER_FILES, complete_steps, step_folder, step_of

CHECKSUMS = "checksums.json"
WEIGHTS, SCORES = "model/", "scores.safetensors"  # each can be verified on its own
RESULT = "checkpoints/"
_FORMAT = "minima-checksums-1"  # tells our file from one of the same name in somebody else's model folder
_CHECKED = (f"{WEIGHTS}*.safetensors", f"{WEIGHTS}*.safetensors.index.json", SCORES)
_TOKENIZER, _IN_MODEL = "tokenizer/", tuple(f"{WEIGHTS}{pattern}" for pattern in TOKENIZER_FILES)
_EDITABLE = (f"{WEIGHTS}config.json", f"{WEIGHTS}generation_config.json", *_IN_MODEL, f"{_TOKENIZER}**/*")
_SHARDS = "weights"  # begins the names of a checkpoint's weights; no other stage reads the rest of it
_Facts = dict[str, Any] | None  # size and checksum, or None for a file that may be edited by hand


def write_checksums(folder: Path, *, editable: bool = False) -> None:
    """Record `bytes` and `sha256` of what a stage leaves; the last step before its manifest is written.

    Args:
        folder: the stage's; nothing is written if it has no such files.
        editable: whether people may edit all but the weights, as in an export: those files are recorded by name only.
    """
    files = _found(folder, (*_CHECKED, *(() if editable else _EDITABLE)))
    if steps := complete_steps(folder / RESULT):  # the newest is the result; with patience, later ones are removed
        files.append(step_folder(folder / RESULT, steps[-1]) / MARKER)
    found = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files
    }
    named = [str(path.relative_to(folder)) for path in _found(folder, _EDITABLE)] if editable else []
    if found or named:
        content = {"format": _FORMAT, "files": found}
        write_json(folder / CHECKSUMS, content | ({"editable": named} if named else {}))


def _found(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    paths = {path for pattern in patterns for path in folder.glob(pattern)}
    return sorted(path for path in paths if path.is_file() and not path.name.startswith("."))


def missing_files(folder: Path) -> list[str]:
    """Recorded files of a finished stage that no longer exist; the content of the others is not checked.

    Raises:
        StoreCorrupted: the checksums themselves are damaged.
    """
    names = list(_read(folder))
    for marker in [name for name in names if name.startswith(RESULT)]:
        # whoever reads the checkpoint reports what is wrong with it
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            shards = json.loads(inside(folder, marker).read_text(encoding="utf-8"))["sha256"]
            names += [str(PurePosixPath(marker).with_name(name)) for name in shards if name.startswith(_SHARDS)]
    return [name for name in names if not inside(folder, name).is_file()]


def result_step(folder: Path) -> int | None:
    """The step whose checkpoint is the result of a finished training stage.

    None if it is not known: the stage is not finished, or an earlier version of minima finished it.

    Raises:
        StoreCorrupted: the checksums themselves are damaged.
    """
    if not (folder / "manifest.json").is_file():
        return None
    markers = [PurePosixPath(name) for name in _read(folder) if name.startswith(RESULT)]
    return step_of(markers[-1].parent.name) if markers else None


def verify_files(folder: Path, prefix: str, part: int = 0, parts: int = 1) -> None:
    """Check the files of a finished stage against their checksums; a folder without checksums is accepted as it is.

    Args:
        folder: the stage's, or any other.
        prefix: check only files whose names begin with it: WEIGHTS, SCORES or RESULT.
        part: check only files whose index modulo `parts` is this, so that ranks can share the reading.
        parts: the number of ranks that share it.

    Raises:
        StoreCorrupted: a file is missing or was changed; the message names it.
        PermissionError: a file may not be read.
    """
    wanted = [(name, facts) for name, facts in _read(folder).items() if name.startswith(prefix)]
    _verify(folder, wanted[part::parts])


def verify_tokenizer(folder: Path) -> None:
    """Check the tokenizer files of a finished stage, wherever they are in its folder, as `verify_files` does."""
    _verify(folder, [(name, facts) for name, facts in _read(folder).items() if _is_of_tokenizer(name)])


def _is_of_tokenizer(name: str) -> bool:
    return name.startswith(_TOKENIZER) or any(fnmatchcase(name, pattern) for pattern in _IN_MODEL)


def _verify(folder: Path, wanted: list[tuple[str, _Facts]]) -> None:
    for name, facts in wanted:
        if facts is None:  # may be edited by hand
            continue
        path = inside(folder, name)
        if fault := file_fault(path, facts["bytes"]):
            raise _damaged(folder, path, fault)
        if (found := file_sha256(path)) != facts["sha256"]:
            raise _damaged(folder, path, f"is damaged: its SHA-256 is {found}, but {facts['sha256']} was written")


def _read(folder: Path) -> dict[str, _Facts]:
    path = folder / CHECKSUMS
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("format", _FORMAT) != _FORMAT:
            return {}
        found: dict[str, dict[str, Any]] = content["files"]
        editable: list[str] = content.get("editable", [])  # missing from files of earlier versions
        whole = all(isinstance(one["bytes"], int) and isinstance(one["sha256"], str) for one in found.values())
        whole &= isinstance(editable, list) and all(isinstance(name, str) for name in editable)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if not (folder / "manifest.json").is_file():  # not a stage of minima, so the file is somebody else's
            return {}
        raise _damaged(folder, path, f"cannot be read ({type(error).__name__}: {error})") from None
    if not whole:
        raise _damaged(folder, path, "does not give the size and the checksum of each file")
    return {**found, **dict.fromkeys(editable)}


def _damaged(folder: Path, path: Path, how: str) -> StoreCorrupted:
    return StoreCorrupted(
        f"{path} {how}",
        f"{folder} is a finished stage, and later stages would continue from something other than its results",
        f"restore the file, or remove {folder} and everything made from it, to make them again",
    )

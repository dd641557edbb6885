"""What a stage folder promises: `started.json` before the work, `manifest.json` as the last thing written."""

import hashlib
import json
import os
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import minima
from minima.errors import StageError
from minima.recipe.data import Source
from minima.recipe.references import references
from minima.recipe.schema import AnyStage, BuildData, Recipe

FINISHED, STARTED = "manifest.json", "started.json"
_VERSIONS = ("torch", "deepspeed", "transformers", "datasets", "sentencepiece", "numpy")
_EDGE_BYTES = 1 << 20  # of a large file, so much is hashed at its start and at its end, beside its size

# Keys that change how a stage is logged, saved or cut into pieces, but not what it computes. They may change between
# two starts of a stage. `micro_batch_sequences` of a prune stage is not one: its score depends on it.
FREE_KEYS = frozenset(
    {
        "log_every_steps",
        "keep_checkpoints",
        "checkpoint_every_steps",
        "evaluate_every_steps",
        "evaluate_sequences",
        "tensorboard",
        "wandb_project",
        "deepspeed",
        "teacher_deepspeed",
        "activation_checkpointing",
        "chunk_tokens",
        "processes",
        "deterministic",
    }
)


def is_finished(folder: Path) -> bool:
    """Whether the stage of this folder has published its manifest."""
    return (folder / FINISHED).is_file()


def read_manifest(folder: Path, name: str = FINISHED) -> dict[str, Any]:
    """A stage's manifest (or its `started.json`).

    Raises:
        StageError: it is missing or not JSON.
    """
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise StageError(
            f"{folder / name} cannot be read ({error})",
            "it says what the folder holds and what it was made from",
            f"remove the folder {folder} to make it again",
        ) from None


def describe(recipe: Recipe, stage: AnyStage, run_folder: Path) -> dict[str, Any]:
    """What `started.json` says: the resolved stage, its inputs' hashes, and the identity that follows from both.

    Args:
        recipe: the whole run.
        stage: the one to describe.
        run_folder: where the earlier stages lie.
    """
    resolved = stage.model_dump(mode="json")
    inputs = input_hashes(recipe, stage, run_folder)
    kept = {key: value for key, value in resolved.items() if key not in _free_keys(stage)}
    return {"stage": resolved, "inputs": inputs, "identity": _digest({"stage": kept, "inputs": inputs})}


def input_hashes(recipe: Recipe, stage: AnyStage, run_folder: Path) -> dict[str, str]:
    """A short hash of every input, by the field that names it.

    A stage counts by the identity in its manifest; a folder by its configuration and its files' names and sizes; a
    data file by its size, first and last mebibyte; a Hub id by its name and revision, since nothing is downloaded.
    """
    hashes = {}
    for reference in references(recipe, stage):
        key = f"{reference.field} ({reference.text})"
        if reference.stage is not None:
            folder = run_folder / reference.stage
            started = reference.step is not None and not is_finished(folder)
            hashes[key] = read_manifest(folder, STARTED if started else FINISHED).get("identity", "unknown")
        else:
            path = Path(reference.text).expanduser()
            hub = {"hub": reference.text, "revision": reference.revision}
            hashes[key] = _folder_digest(path) if path.exists() else _digest(hub)
    if isinstance(stage, BuildData):
        for index, source in enumerate(stage.sources):
            hashes[f"sources.{index} ({source.label})"] = _source_digest(source)
    return hashes


def check_unchanged(description: dict[str, Any], folder: Path) -> None:
    """Refuse to skip or resume a folder that was made from something else.

    Args:
        description: what the recipe asks for now, from `describe`.
        folder: the stage's folder; may be missing or empty.

    Raises:
        StageError: the stage or one of its inputs has changed since the folder was begun.
    """
    name = FINISHED if is_finished(folder) else STARTED
    if not (folder / name).is_file() or {path.name for path in folder.iterdir()} == {STARTED}:
        return  # nothing was made yet: a mistake that is mended after a first try finds no obstacle
    before = read_manifest(folder, name)
    if before.get("identity") == description["identity"]:
        return
    state = "finished" if name == FINISHED else "half-finished"
    old, new = before.get("stage", {}), description["stage"]
    changed = [
        f"{key} is {_short(new.get(key))} and was {_short(old.get(key))}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key) and key not in FREE_KEYS | {"micro_batch_sequences"}
    ]
    changed = changed or [  # only where the stage itself is the same: a changed field changes the inputs with it
        f"its input {key} has changed"
        for key in dict.fromkeys([*before.get("inputs", {}), *description["inputs"]])
        if before.get("inputs", {}).get(key) != description["inputs"].get(key)
    ]
    changed = changed or ["micro_batch_sequences has changed"]
    raise StageError(
        f"stage {new['name']!r} is {state} in {folder}, but {'; '.join(changed)}",
        "going on would mix results of two different runs under one name",
        f"remove {folder} to make it again (and the later stages that read it), undo the change, "
        "or take another output folder with output=PATH",
    )


def write_started(folder: Path, description: dict[str, Any]) -> None:
    """Say what is being made here, before the first byte of it. Keeps the time of the first start."""
    started = _now()
    if (folder / STARTED).is_file():
        started = read_manifest(folder, STARTED).get("started", started)
    write_json(folder / STARTED, description | {"versions": versions(), "started": started})


def write_manifest(folder: Path, metrics: dict[str, Any], seconds: float) -> None:
    """Publish a stage: the last thing that is written into its folder.

    Args:
        folder: the stage's folder, with its `started.json`.
        metrics: what the stage measured.
        seconds: of work since the stage was last started.
    """
    started = read_manifest(folder, STARTED)
    write_json(
        folder / FINISHED,
        started | {"versions": versions(), "metrics": metrics, "seconds": round(seconds, 3), "finished": _now()},
    )


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False, default=str)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def versions() -> dict[str, str]:
    """Versions of minima and of what its results depend on, without importing any of it."""
    found = {"minima": minima.__version__}
    for name in _VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _free_keys(stage: AnyStage) -> frozenset[str]:
    return FREE_KEYS if stage.kind == "prune" else FREE_KEYS | {"micro_batch_sequences"}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _source_digest(source: Source) -> str:
    if source.path is None:
        return _digest(source.model_dump(mode="json"))
    path = Path(source.path).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    else:
        files = (
            sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor)))) if not path.exists() else [path]
        )
    return _digest([(file.name, _file_digest(file)) for file in files if file.is_file()])


def _folder_digest(path: Path) -> str:
    if path.is_file():
        return _file_digest(path)
    if is_finished(path):
        return read_manifest(path).get("identity", "unknown")
    files = sorted(file for file in path.iterdir() if file.is_file())
    small = {file.name: _file_digest(file) for file in files if file.suffix == ".json"}
    return _digest([small, [(file.name, file.stat().st_size) for file in files]])


def _file_digest(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        digest.update(file.read(_EDGE_BYTES))
        file.seek(max(_EDGE_BYTES, size - _EDGE_BYTES))
        digest.update(file.read(_EDGE_BYTES))
    return digest.hexdigest()[:32]

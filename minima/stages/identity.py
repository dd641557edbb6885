"""The identity of a stage: one hash of its settings and inputs, and the refusal to reuse a changed stage. No torch."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from minima.errors import StageError
from minima.recipe.distillation import PLACING
from minima.recipe.references import Reference, readers, references, sources
from minima.recipe.schema import AnyStage, Recipe
from minima.stages.digests import digest, folder_digest, former_source_digest, is_gone, source_digest
from minima.stages.manifest import FINISHED, STARTED, is_begun, is_finished, read_manifest

# Keys that change how a stage is logged, saved or split up, but not what it computes. They may change between two
# starts of a stage. `micro_batch_sequences` of a prune stage is not one: its score depends on it.
FREE_KEYS = frozenset(
    {
        "log_every_steps", "keep_checkpoints", "keep_every_steps", "watchdog_seconds", "checkpoint_every_steps",
        "evaluate_every_steps", "evaluate_sequences", "tensorboard", "wandb_project", "deepspeed",
        "reference_deepspeed", "precompute_reference", "activation_checkpointing", "compile", "kernels",
        "chunk_tokens", "processes", "batch_size", "deterministic",
    }
)  # fmt: skip

_DECIDING = frozenset({"evaluate_every_steps", "evaluate_sequences"})  # with patience, they decide when a run ends

# Identities omit default values, so that a key added by a later version does not make finished stages look changed.
# Raise this number when the value or the meaning of a default changes.
_DEFAULTS = 1


def describe(
    recipe: Recipe, stage: AnyStage, run_folder: Path, planned: dict[str, str] | None = None
) -> dict[str, Any]:
    """The content of `started.json`: the resolved stage, its inputs' hashes, and the identity derived from both.

    Args:
        planned: identities that unfinished stages will have, by name; filled in as needed. An identity depends only on
            the recipe and the inputs, so no stage has to run for it. If None, an unfinished input is an error.

    Raises:
        StageError: an input stage is not finished, and `planned` is None.
    """
    resolved = stage.model_dump(mode="json")
    inputs = input_hashes(recipe, stage, run_folder, planned)
    chosen = stage.model_dump(mode="json", exclude_defaults=True)
    kept = {key: value for key, value in chosen.items() if key not in free_keys(stage)} | {"defaults": _DEFAULTS}
    if "teacher" in kept:
        kept["teacher"] = _without_place(kept["teacher"])
    return {"stage": resolved, "inputs": inputs, "identity": digest({"stage": kept, "inputs": inputs})}


def input_hashes(
    recipe: Recipe, stage: AnyStage, run_folder: Path, planned: dict[str, str] | None = None
) -> dict[str, str]:
    """A short hash of every input, by the field that names it.

    For a stage, the hash is its identity. Files and folders are hashed as in `digests`. A Hub id is hashed by name and
    revision, because nothing is downloaded here.
    """
    hashes = {}
    for reference in references(recipe, stage):
        key = f"{reference.field} ({reference.text})"
        if reference.stage is not None:
            hashes[key] = _stage_identity(recipe, reference, run_folder, planned)
            continue
        path = Path(reference.text).expanduser()
        if not path.exists():
            hashes[key] = digest({"hub": reference.text, "revision": reference.revision})
        elif is_finished(path):
            hashes[key] = read_manifest(path).get("identity", "unknown")
        else:
            hashes[key] = folder_digest(path)
    own = run_folder / stage.name
    built = read_manifest(own).get("inputs", {}) if is_finished(own) else {}
    for field, source in sources(stage):
        key = f"{field} ({source.label})"
        # Text that was removed after its blocks were built, or stayed on another machine, counts as unchanged.
        same = key in built and (is_gone(source) or built[key] == former_source_digest(source))
        hashes[key] = built[key] if same else source_digest(source)
    files = [(field, getattr(stage, field, None)) for field in ("chat_template", "task_folder", "data_folder")]
    files += [("answers", answers.questions) for answers in getattr(stage, "answers", [])]
    for field, text in files:
        if text is not None and (path := Path(text).expanduser()).exists():
            hashes[f"{field} ({text})"] = folder_digest(path)
    return hashes


def _stage_identity(recipe: Recipe, reference: Reference, run_folder: Path, planned: dict[str, str] | None) -> str:
    assert reference.stage is not None
    folder = run_folder / reference.stage
    if is_finished(folder):
        return read_manifest(folder).get("identity", "unknown")
    if reference.step is not None and (planned is None or is_begun(folder)):  # a checkpoint of a half-finished stage
        return read_manifest(folder, STARTED).get("identity", "unknown")
    if planned is None:
        return read_manifest(folder).get("identity", "unknown")
    if reference.stage not in planned:
        earlier = recipe.stage(reference.stage)
        planned[reference.stage] = describe(recipe, earlier, run_folder, planned)["identity"]
    return planned[reference.stage]


def check_unchanged(description: dict[str, Any], folder: Path, recipe: Recipe) -> None:
    """Refuse to skip or resume a folder that was made from other settings or inputs.

    Args:
        description: what the recipe asks for now, from `describe`.
        recipe: the whole run, so that the error can name the later stages that read this one.

    Raises:
        StageError: the stage or one of its inputs has changed since the folder was started.
    """
    name = FINISHED if is_finished(folder) else STARTED
    if name == STARTED and not is_begun(folder):
        return  # nothing was produced yet, so a recipe that was corrected after a failed first try may start
    before = read_manifest(folder, name)
    if before.get("identity") == description["identity"]:
        return
    state = "finished" if name == FINISHED else "half-finished"
    old, new = before.get("stage", {}), description["stage"]
    free = FREE_KEYS | {"micro_batch_sequences"}
    if new.get("patience") is not None:
        free -= _DECIDING
    changed = [
        text
        for key in dict.fromkeys([*old, *new])
        for text in differences(_without_place(old.get(key)), _without_place(new.get(key)), key)
        if key not in free
    ]
    changed = changed or [  # only if the stage's own settings are the same, since a changed field changes inputs too
        f"its input {key} has changed"
        for key in dict.fromkeys([*before.get("inputs", {}), *description["inputs"]])
        if before.get("inputs", {}).get(key) != description["inputs"].get(key)
    ]
    before_micro, now_micro = old.get("micro_batch_sequences"), new.get("micro_batch_sequences")
    if not changed and before_micro != now_micro:
        changed = [f"micro_batch_sequences is {now_micro} and was {before_micro}"]
    changed = changed or ["it was made by a version of minima that hashes inputs differently"]
    raise _refusal(recipe, new["name"], folder, state, changed)


def _refusal(recipe: Recipe, name: str, folder: Path, state: str, changed: list[str]) -> StageError:
    return StageError(
        f"stage {name!r} is {state} in {folder}, but {'; '.join(changed)}",
        "continuing would mix the results of two different runs under one name",
        f"remove {folder} to make it again{made_from(recipe, name, folder.parent)}, undo the change, or choose another "
        "output folder with output=PATH",
    )


def made_from(recipe: Recipe, name: str, run_folder: Path) -> str:
    """Text for an error message that names the later stages made from a stage, which must be removed with it."""
    folders = [run_folder / later for later in readers(recipe, name)]
    made = [folder.name for folder in folders if is_begun(folder) or is_finished(folder)]
    return f" (with what was made from it: {', '.join(made)})" if made else ""


def changed_settings(stage: AnyStage, folder: Path) -> list[str]:
    """How a stage's settings differ from those that its folder was started with, one line each.

    Inputs are not compared: they may be on another machine, or deleted.
    """
    finished = is_finished(folder)
    if not finished and not is_begun(folder):
        return []
    before = read_manifest(folder, FINISHED if finished else STARTED).get("stage", {})
    if before and before.get("kind") != stage.kind:
        return differences(before.get("kind"), stage.kind, "kind")
    try:
        made = type(stage).model_validate(before)
    except ValueError:  # a key of another version of minima, or not a stage's folder
        return []
    return differences(_settings(made), _settings(stage))


def _settings(stage: AnyStage) -> dict[str, Any]:
    free = free_keys(stage)
    return {key: _without_place(value) for key, value in stage.model_dump(mode="json").items() if key not in free}


def differences(before: Any, now: Any, key: str = "") -> list[str]:
    """The differences between two values, part by part: `sources.0.max_documents is 601 and was 600`."""
    parts: Iterable[Any] = ()
    if isinstance(before, dict) and isinstance(now, dict):
        parts = ((part, before.get(part), now.get(part)) for part in dict.fromkeys([*before, *now]))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        parts = zip(range(len(now)), before, now, strict=True)
    elif isinstance(before, list) and isinstance(now, list):
        changes = [("new", [entry for entry in now if entry not in before])]
        changes.append(("gone", [entry for entry in before if entry not in now]))
        told = "".join(f"; {what}: {', '.join(map(_short, entries))}" for what, entries in changes if entries)
        return [f"{key} has {len(now)} entries and had {len(before)}{told}"]
    elif before != now:
        return [f"{key} is {_short(now)} and was {_short(before)}"]
    return [text for part, old, new in parts for text in differences(old, new, f"{key}.{part}" if key else str(part))]


def check_read(recipe: Recipe, stages: Sequence[AnyStage], run_folder: Path) -> None:
    """Refuse stages that the selected ones read, directly or indirectly, if they were made with other settings.

    Otherwise, what is made from them would be recorded as coming from the current recipe.

    Raises:
        StageError: names the first such stage and what has changed.
    """
    for name, changed in read_and_changed(recipe, stages, run_folder).items():
        folder = run_folder / name
        raise _refusal(recipe, name, folder, "finished" if is_finished(folder) else "half-finished", changed)


def read_and_changed(recipe: Recipe, stages: Sequence[AnyStage], run_folder: Path) -> dict[str, list[str]]:
    """By name, the changes in stages that the selected ones read and that are not selected themselves."""
    chosen = {stage.name for stage in stages}
    read = set(chosen)
    for stage in reversed(recipe.stages):  # a stage reads earlier ones
        if stage.name in read:
            read |= {reference.stage for reference in references(recipe, stage) if reference.stage is not None}
    others = [stage for stage in recipe.stages if stage.name in read - chosen]
    found = {stage.name: changed_settings(stage, run_folder / stage.name) for stage in others}
    return {name: changed for name, changed in found.items() if changed}


def check_run(recipe: Recipe, stages: Sequence[AnyStage], run_folder: Path) -> None:
    """Refuse stages that do not match the recipe and their inputs, or will not match them once `stages` have run.

    A finished stage whose input is about to be made again is accepted if the new input will be the same.

    Args:
        stages: those about to run, or to be skipped as finished.

    Raises:
        StageError: names the first such stage and what has changed.
    """
    chosen = {stage.name for stage in stages}
    remade = {name for name in chosen if not is_finished(run_folder / name)}
    planned: dict[str, str] = {}
    check_read(recipe, stages, run_folder)
    for stage in recipe.stages:
        folder = run_folder / stage.name
        own = stage.name in chosen and (is_finished(folder) or is_begun(folder))
        if own or (is_finished(folder) and any(read.stage in remade for read in references(recipe, stage))):
            check_unchanged(describe(recipe, stage, run_folder, planned), folder, recipe)


def _without_place(value: Any) -> Any:
    """A stage's setting without the keys for a teacher's placement, which may change between two starts."""
    return {key: inner for key, inner in value.items() if key not in PLACING} if isinstance(value, dict) else value


def free_keys(stage: AnyStage) -> frozenset[str]:
    """Keys that a stage's identity omits, as they may change between two starts; `PLACING` has those of a teacher."""
    if stage.kind == "prune":
        return FREE_KEYS
    ends_early = getattr(stage, "patience", None) is not None  # then the held-out losses decide what is trained
    free = FREE_KEYS - _DECIDING if ends_early else FREE_KEYS
    return free | {"micro_batch_sequences"}


def _short(value: Any) -> str:
    if isinstance(value, dict):
        value = {key: inner for key, inner in value.items() if inner is not None}
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."

"""Selects the files of a model folder to push to the Hub, and checks that they are complete. No DeepSpeed."""

import fnmatch
import json
from collections.abc import Sequence
from pathlib import Path

from minima.errors import StageError
from minima.models.checksums import missing_files
from minima.models.layout import model_folder
from minima.models.weights import FolderSource
from minima.report.benchmark_card import split
from minima.stages.manifest import FINISHED, STARTED, is_finished, read_manifest
from minima.stages.release.card_update import updated_card

PUSHED_MODEL_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors",
    "model.safetensors.index.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "spiece.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
_BESIDE = ("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")


def locate(folder: Path) -> tuple[Path, Path | None]:
    """The model's folder, and the folder of its export stage; None if no stage of minima wrote it.

    Raises:
        StageError: there is no such folder, or it belongs to another kind of stage or to an unfinished one.
    """
    if not folder.is_dir():
        raise StageError(
            f"there is no folder {folder}", "nothing can be pushed", "give an export stage's folder, or its model/"
        )
    folder = folder.resolve()
    model = model_folder(folder)
    places = [folder, folder.parent] if folder.name == "model" else [folder]
    stage = next((place for place in places if (place / STARTED).is_file()), None)
    if stage is None:
        return model, None
    if not is_finished(stage):
        raise StageError(
            f"{stage} has no {FINISHED}: it is not finished",
            "its content may be incomplete, and was not checked",
            "run its recipe again; `minima run` resumes what is left",
        )
    kind = read_manifest(stage).get("stage", {}).get("kind")
    if kind != "export":
        raise StageError(
            f"{stage} is a stage of kind {kind}",
            "only an export has been compared with the trained model, and has a model card",
            "add an export stage to the recipe, and push its folder",
        )
    return model, stage


def check_nothing_lost(stage: Path, model: Path) -> None:
    """Refuse an export that has lost a file. Without its tokenizer.json, for example, it may load with other tokens.

    Raises:
        StageError: names the files.
        StoreCorrupted: what the stage says of its files cannot be read.
    """
    if gone := missing_files(stage):
        raise StageError(
            f"{', '.join(str(stage / name) for name in gone)} no longer exist{'s' if len(gone) == 1 else ''}",
            "without it, nobody could load the model, or it would read other tokens",
            f"restore it, or remove {stage} to export the model again; if you removed it on purpose, push a copy of "
            f"{model} that is outside the run",
        )


def check_files(model: Path) -> tuple[list[str], list[str]]:
    """The files to push, and what is left out.

    Raises:
        CheckpointError: a weight is missing or cannot be read.
        StageError: a file that every model needs is missing.
    """
    found = sorted(path.name for path in model.iterdir())
    files = [name for name in found if matches(name, (*PUSHED_MODEL_FILES, *_BESIDE)) and (model / name).is_file()]
    missing = [name for name in ("config.json", "README.md") if name not in files]
    if missing:
        raise StageError(
            f"{model} has no {' and no '.join(missing)}",
            "nobody could load it, or know what it is",
            "push the output of an export stage, or add the missing file",
        )
    FolderSource(model)  # opens every weight file
    index = model / "model.safetensors.index.json"
    if index.is_file():
        used = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [name for name in files if not name.endswith(".safetensors") or name in used]
    return files, [name for name in found if name not in files]


def current_card(path: Path, stage: Path | None) -> str:
    """The model card to push, with the benchmark scores that were measured since the export.

    Args:
        path: of the README.md.
        stage: the export stage's folder; None for other folders, whose card is left unchanged.

    Raises:
        StageError: its front matter, or the results of a benchmark stage beside it, cannot be read.
    """
    try:
        card = path.read_text(encoding="utf-8")
        split(card)
    except ValueError as error:  # UnicodeDecodeError is one
        raise StageError(
            f"the front matter of {path} cannot be read ({error})",
            "the Hub reads licence, language and base model there",
            "fix the text between its first two lines of ---",
        ) from error
    return card if stage is None else updated_card(stage, card)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a file's name matches one of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

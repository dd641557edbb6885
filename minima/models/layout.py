"""Where weights are stored: files of a model folder in Hugging Face's layout, and a stage's checkpoints. No torch."""

import json
import os
import re
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer*", "spiece.model", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.*",
)  # fmt: skip
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")  # a tokenizer has one of them

_STEP = re.compile(r"step-([0-9]{8,})(\.partial)?")  # a name from `step_folder`; `.partial` marks an incomplete save
MARKER = "checkpoint.json"  # written last: a checkpoint without it does not count


def step_folder(checkpoints: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` updates."""
    return checkpoints / f"step-{step:08d}"


def complete_steps(checkpoints: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending; those set aside as damaged do not count.

    Raises:
        PermissionError: the folder, or one of its checkpoints, may not be read.
    """
    names = os.listdir(checkpoints) if checkpoints.is_dir() else ()
    steps = [step for name in names if not name.endswith(".partial") and (step := step_of(name)) is not None]
    return sorted(step for step in steps if _has_marker(step_folder(checkpoints, step)))


def step_of(name: str) -> int | None:
    """The step in the name of a checkpoint's folder or of an incomplete save; None for any other name."""
    found = _STEP.fullmatch(name)
    return None if found is None else int(found[1])


def _has_marker(checkpoint: Path) -> bool:
    try:
        (checkpoint / MARKER).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True  # a PermissionError is passed on: skipping an existing checkpoint would resume from an older one


def model_folder(folder: Path) -> Path:
    """The folder that plain transformers loads: an export stage keeps it as `model/` inside its own.

    Args:
        folder: an export stage's folder, or one in Hugging Face's layout, which is returned unchanged.
    """
    inner = folder / "model"
    return inner if (inner / "config.json").is_file() and not (folder / "config.json").is_file() else folder


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer in a folder has a chat template."""
    settings = folder / "tokenizer_config.json"
    return any(folder.glob("chat_template*")) or (
        settings.is_file() and bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))
    )

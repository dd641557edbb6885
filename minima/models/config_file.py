"""A model's `config.json`, as it is read from a folder. No torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minima.errors import CheckpointError


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `folder/config.json`.

    Raises:
        CheckpointError: it is missing, or not a JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config, dict):
            return config
        problem = "it is not a JSON object"
    except (OSError, ValueError, RecursionError) as error:
        problem = str(error)
    raise CheckpointError(
        f"{path} cannot be read: {problem}",
        "without it the model's shape is not known",
        "give a folder in Hugging Face's layout, the name of a stage, or a Hub id",
    )


def check_unquantised(config: Mapping[str, Any]) -> None:
    """Refuse the `config.json` of a model whose weights are scaled or packed.

    Raises:
        CheckpointError: they are.
    """
    how = config.get("quantization_config") or {}
    loads = ("load_in_4bit", "load_in_8bit")  # of bitsandbytes, which also writes that it has done nothing
    if how and not (isinstance(how, dict) and all(how.get(key) is False for key in loads)):
        raise CheckpointError(
            "the model's config.json has a quantization_config: its weights are quantised",
            "they are scaled or packed, and would be read as if they were the weights themselves",
            "use the model's version that is not quantised",
        )

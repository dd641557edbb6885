"""A run's folder belongs to one recipe."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from minima.errors import StageError

_OWN = ("lock", "logs", "cluster", "cells")  # what may lie in a folder before its recipe does


def claim_run_folder(folder: Path, name: str, stages: Sequence[str], resolved: str) -> None:
    """Make the folder and keep the resolved recipe in it as `recipe.yaml`.

    Args:
        folder: the run's.
        name: of the recipe.
        stages: names of its stages.
        resolved: the recipe's YAML with all defaults.

    Raises:
        StageError: the folder belongs to another recipe, or holds something else.
    """
    check_run_folder(folder, name, stages)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".recipe.yaml.{os.getpid()}"
    temporary.write_text(resolved, encoding="utf-8")
    os.replace(temporary, folder / "recipe.yaml")


def check_run_folder(folder: Path, name: str, stages: Sequence[str]) -> None:
    """Refuse a folder of another recipe, without writing anything.

    A recipe may gain and lose stages; another name, or no stage in common, makes it another recipe.

    Raises:
        StageError: the folder belongs to another recipe, or holds something else.
    """
    do = f"take another folder with output=PATH, or move {folder} away"
    if folder.exists() and not folder.is_dir():
        raise StageError(f"the output {folder} is a file", "a run's stages are folders inside its folder", do)
    if not folder.is_dir() or not (set(os.listdir(folder)) - {*_OWN, ".recipe.yaml"}):
        return
    try:
        kept: Any = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        other, other_stages = kept["name"], [stage["name"] for stage in kept["stages"]]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        raise StageError(
            f"the output folder {folder} holds files but no recipe.yaml of a run",
            "a run writes into its folder, and nothing of yours may be lost",
            do,
        ) from None
    if other != name or not set(other_stages) & set(stages):
        raise StageError(
            f"{folder} is the output folder of another recipe ({other!r} with {', '.join(other_stages)}; "
            f"this one is {name!r})",
            "stages of two recipes would overwrite each other",
            do,
        )

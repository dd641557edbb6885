"""Access to a run's folder, which belongs to one recipe."""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from minima.disk import disk_full_named, write_whole
from minima.errors import StageError

_OWN = ("lock", "logs", "cluster", "cells")  # may exist in a folder before its recipe does


@contextmanager
def access_named(folder: Path) -> Iterator[None]:
    """Turn the operating system's errors about a run's folder into one that says what to do.

    Raises:
        StageError: the folder, or a file in it, cannot be created, read or written.
        DiskFull: there is no space for it.
    """
    try:
        with disk_full_named(folder):
            yield
    except OSError as error:
        raise StageError(
            f"the folder {folder} cannot be used ({error})",
            "a run keeps its lock, its logs and its stages in its folder",
            "make sure that every part of that path is a folder and that you may write there, or choose another with "
            "output=PATH",
        ) from error


def claim_run_folder(folder: Path, name: str, stages: Sequence[str], resolved: str) -> None:
    """Create the folder and save the resolved recipe in it as `recipe.yaml`.

    Args:
        folder: the run's.
        name: of the recipe.
        stages: names of its stages.
        resolved: the recipe's YAML with all defaults.

    Raises:
        StageError: the folder belongs to another recipe, or contains something else.
    """
    check_run_folder(folder, name, stages)
    with access_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "recipe.yaml", resolved)


def has_recipe(folder: Path) -> bool:
    """Whether a run has been started in a folder."""
    return (folder / "recipe.yaml").is_file()


def check_run_folder(folder: Path, name: str, stages: Sequence[str]) -> None:
    """Refuse a folder of another recipe, without writing anything.

    A recipe may gain and lose stages; another name, or no stage in common, makes it another recipe.

    Raises:
        StageError: the folder belongs to another recipe, contains something else, or cannot be read.
    """
    do = f"choose another folder with output=PATH, or move {folder} away"
    with access_named(folder):
        if folder.exists() and not folder.is_dir():
            raise StageError(f"the output {folder} is a file", "a run's stages are folders inside its folder", do)
        for parent in folder.parents:
            if parent.exists() and not parent.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(parent))
        held = set(os.listdir(folder)) if folder.is_dir() else set()
        if all(name in _OWN or name.startswith(".recipe.yaml") for name in held):  # the latter: from a failed write
            return
        path = folder / "recipe.yaml"
        text = path.read_bytes() if path.is_file() else b""
    try:
        kept: Any = yaml.safe_load(text.decode("utf-8"))
        other, other_stages = kept["name"], [str(stage["name"]) for stage in kept["stages"]]
    except (ValueError, yaml.YAMLError, KeyError, TypeError):  # bytes that are not UTF-8 raise a ValueError
        raise StageError(
            f"the output folder {folder} contains files, but no recipe.yaml of a run",
            "a run writes into its folder, and could overwrite files of yours",
            do,
        ) from None
    if other != name or not set(other_stages) & set(stages):
        raise StageError(
            f"{folder} is the output folder of another recipe ({other!r} with {', '.join(other_stages)}; "
            f"this one is {name!r})",
            "stages of two recipes would overwrite each other",
            do,
        )

"""Access to a run's folder, which belongs to one recipe."""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from minima.disk import write_whole
from minima.disk_errors import disk_full_named, is_failing
from minima.errors import FileFailed, MinimaError, StageError
from minima.recipe.loading import resolved_yaml
from minima.recipe.overrides import BoundedLoader
from minima.recipe.schema import Recipe
from minima.stages.identity import describe
from minima.stages.manifest import FINISHED, STARTED, is_finished, read_manifest

_OWN = ("lock", "logs", "cluster", "cells")  # may exist in a folder before its recipe does
logger = logging.getLogger("minima.run")


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
        raise (FileFailed if is_failing(error) else StageError)(
            f"the folder {folder} cannot be used ({error})",
            "a run keeps its lock, its logs and its stages in its folder",
            "make sure that every part of that path is a folder and that you may write there, or choose another with "
            "output=PATH",
        ) from error


def claim_run_folder(folder: Path, recipe: Recipe) -> None:
    """Create the folder and save the resolved recipe in it as `recipe.yaml`.

    Raises:
        StageError: the folder belongs to another recipe, or contains something else.
    """
    known_by = check_run_folder(folder, recipe)
    with access_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "recipe.yaml", resolved_yaml(recipe))
    if known_by is not None:
        logger.warning(
            "%s was lost or damaged and is written again: stage %s in that folder was made by this recipe",
            folder / "recipe.yaml", known_by,
        )  # fmt: skip


def has_recipe(folder: Path) -> bool:
    """Whether a run has been started in a folder."""
    return (folder / "recipe.yaml").is_file()


def check_run_folder(folder: Path, recipe: Recipe) -> str | None:
    """Refuse a folder of another recipe, without writing anything.

    A recipe may gain and lose stages; another name, or no stage in common, makes it another recipe. A folder that has
    lost its `recipe.yaml` is still this recipe's if a stage in it was made from what the recipe says.

    Returns:
        The name of that stage; None where nothing is lost.

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
            return None
        path = folder / "recipe.yaml"
        text = path.read_bytes() if path.is_file() else b""
    try:
        # Earlier versions wrote the name `1e5` without quotes, so here no text is a number that YAML 1.1 has not.
        kept: Any = yaml.load(text.decode("utf-8"), Loader=BoundedLoader)
        other, other_stages = kept["name"], [str(stage["name"]) for stage in kept["stages"]]
    except (ValueError, yaml.YAMLError, KeyError, TypeError):  # bytes that are not UTF-8 raise a ValueError
        if known_by := _stage_made_by(recipe, folder):
            return known_by
        raise StageError(
            f"the output folder {folder} contains files, but no recipe.yaml of a run, nor a stage made by this recipe",
            "a run writes into its folder, and could overwrite files of yours",
            f"{do}; if it is a run that has lost its recipe.yaml, copy the run's recipe to {path}",
        ) from None
    if other != recipe.name or not set(other_stages) & {stage.name for stage in recipe.stages}:
        raise StageError(
            f"{folder} is the output folder of another recipe ({other!r} with {', '.join(other_stages)}; "
            f"this one is {recipe.name!r})",
            "stages of two recipes would overwrite each other",
            do,
        )
    return None


def _stage_made_by(recipe: Recipe, folder: Path) -> str | None:
    """The first stage in a folder whose identity is the one that it has in a recipe."""
    planned: dict[str, str] = {}
    for stage in recipe.stages:
        own = folder / stage.name
        try:
            identity = read_manifest(own, FINISHED if is_finished(own) else STARTED).get("identity")
            if identity is not None and identity == describe(recipe, stage, folder, planned)["identity"]:
                return stage.name
        except (MinimaError, OSError):  # not there, or not to be read: another stage may say more
            continue
    return None

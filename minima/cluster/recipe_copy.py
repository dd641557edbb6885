"""Copies of submitted recipes: a job reads the recipe as submitted, even if its file changes later. No torch."""

import hashlib
from pathlib import Path

from minima.disk import write_whole
from minima.errors import ClusterError
from minima.recipe.references import deepspeed_jsons
from minima.recipe.schema import AnyStage, Recipe
from minima.recipe.secret import secret_place
from minima.stages.shipped import find_deepspeed_json, shipped_folder


def copy_recipe(recipe: Recipe, recipe_path: Path, folder: Path, write: bool) -> Path:
    """Copy the recipe's file, with the DeepSpeed JSONs beside it.

    Each version has its own folder, so submitting an edited recipe does not change what waiting jobs read.

    Args:
        folder: for all copies.
        write: make the copy; otherwise only return its path.

    Returns:
        The copy's path.

    Raises:
        ClusterError: a file has a token or a password, for example in a comment.
    """
    files = {recipe_path.name: recipe_path.read_bytes()}
    for stage in recipe.stages:
        files |= own_jsons(stage, recipe_path)
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        if secret_place(content.decode("utf-8", "replace")) is not None:
            raise ClusterError(
                f"{name} has what looks like a token or a password, perhaps in a comment",
                "it is copied into the run's folder, where others may read it",
                "remove it, and export it instead in the shell that submits: HF_TOKEN, HTTPS_PROXY",
            )
        digest.update(f"{len(name)} {name} {len(content)} ".encode() + content)
    target = folder / digest.hexdigest()[:12]
    for name, content in files.items() if write else ():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    return target / recipe_path.name


def own_jsons(stage: AnyStage, recipe_path: Path) -> dict[str, bytes]:
    """The contents of a stage's DeepSpeed JSONs that are beside its recipe, by their relative paths."""
    files = {}
    for name in deepspeed_jsons(stage):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            continue
        path = find_deepspeed_json(name, recipe_path)
        if path != shipped_folder("ds_configs") / name:
            files[f"ds_configs/{name}"] = path.read_bytes()
    return files

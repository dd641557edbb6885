"""Finds recipes, DeepSpeed JSONs and launchers: beside the recipe, in the clone, or in the wheel."""

from pathlib import Path

import minima
from minima.engine.deepspeed_config import read_deepspeed_json
from minima.errors import RecipeError
from minima.recipe.distillation import Teacher
from minima.recipe.overrides import nearest
from minima.recipe.schema import AnyStage

_PACKAGE = Path(minima.__file__).parent
_CLONE = _PACKAGE.parent


def shipped_folder(kind: str) -> Path:
    """The folder of shipped `recipes`, `ds_configs`, `launch` or `slurm` files: the clone's, or the wheel's copy."""
    return _CLONE / kind if (_CLONE / "pyproject.toml").is_file() else _PACKAGE / "bundled" / kind


def find_recipe(name: str) -> Path:
    """Find a recipe by its path, or by the name of one that minima ships.

    Raises:
        RecipeError: there is no such file and no such shipped recipe.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    folder = shipped_folder("recipes")
    for candidate in (folder / path.name, folder / f"{path.name}.yaml"):
        if path.parent in (Path("."), Path("recipes")) and candidate.is_file():
            return candidate
    shipped = sorted(file.stem for file in folder.glob("*.yaml"))
    raise RecipeError(
        f"there is no recipe {name!r} on this machine{nearest(name, shipped)}",
        "the recipe defines the run",
        f"give the path of a YAML file, or the name of a shipped recipe: {', '.join(shipped) or 'none found'}",
    )


def find_deepspeed_json(name: str, recipe_path: Path) -> Path:
    """Find a DeepSpeed JSON: a path, a file beside the recipe or in `ds_configs/` there, or one that minima ships.

    Raises:
        RecipeError: there is none of that name.
    """
    beside = recipe_path.resolve().parent
    shipped = shipped_folder("ds_configs")
    for path in (beside / name, beside / "ds_configs" / name, shipped / name):
        if path.is_file():
            return path
    known = ", ".join(sorted(file.name for file in shipped.glob("*.json")))
    raise RecipeError(
        f"there is no DeepSpeed JSON {name!r} beside {recipe_path} or among the shipped ones",
        "it defines how the model is sharded across the ranks",
        f"put it beside the recipe, or choose a shipped one: {known or 'none found'}",
    )


def check_deepspeed_json(stage: AnyStage, name: str, recipe_path: Path) -> None:
    """Refuse a DeepSpeed JSON that the stage naming it could not run with.

    Raises:
        RecipeError: there is none of that name.
        DeepSpeedConfigError: it cannot be read, sets what the recipe owns, or is for another placement.
    """
    path, teacher = find_deepspeed_json(name, recipe_path), getattr(stage, "teacher", None)
    if isinstance(teacher, Teacher) and name == teacher.deepspeed and teacher.placement != "auto":
        read_deepspeed_json(path, teacher.placement, teacher.offload)
    else:
        read_deepspeed_json(path)


def find_launcher(name: str, recipe_path: Path) -> Path:
    """Find the shell file `launch/NAME.sh` beside the recipe, or the one that minima ships.

    Raises:
        RecipeError: there is none of that name.
    """
    folders = (recipe_path.resolve().parent / "launch", shipped_folder("launch"))
    for folder in folders:
        if (folder / f"{name}.sh").is_file():
            return folder / f"{name}.sh"
    known = sorted({file.stem for folder in folders for file in folder.glob("*.sh")})
    raise RecipeError(
        f"there is no launcher {name!r}{nearest(name, known)}",
        "it would start the ranks of a stage",
        f"choose among {', '.join(known)}, or write {folders[0] / name}.sh",
    )

"""Load a recipe file and its overrides into a checked `Recipe`; every mistake is named with its place."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from minima.errors import MinimaError, RecipeError
from minima.recipe.overrides import RecipeDumper, RecipeLoader, apply_override
from minima.recipe.problems import problem
from minima.recipe.references import check_references
from minima.recipe.schema import Recipe
from minima.recipe.secret import secret_place

_OF_A_STUDY = {"teachers", "students"}
_MOST_VALUES = 1_000_000  # the quickstart has some five hundred


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load the recipe in `path`, changed by `overrides`.

    Args:
        overrides: `key.path=value`, applied in order.

    Raises:
        RecipeError: the file is missing or broken, or asks for something that does not exist or is impossible.
        MinimaError: another error, raised by a field's own check.
    """
    raw = read_yaml(path)
    for override in overrides:
        apply_override(raw, override)
    return make_recipe(raw, path)


def is_study(path: Path) -> bool:
    """Whether a file is a study of the law (a grid of runs) rather than the recipe of one run.

    Raises:
        RecipeError: the file is missing or broken.
    """
    return read_yaml(path).keys() >= _OF_A_STUDY


def make_recipe(raw: dict[str, Any], path: Path) -> Recipe:
    """Make a checked recipe from the content of its YAML file.

    Args:
        path: the file that errors name.

    Raises:
        RecipeError: it asks for something that does not exist or is impossible.
        MinimaError: another error, raised by a field's own check.
    """
    if raw.keys() >= _OF_A_STUDY:
        raise RecipeError(
            f"{path.name} is a study of teachers and students, not the recipe of one run",
            "a study is a grid of runs, each of which has a recipe of its own",
            f"minima law study {path}",
        )
    if place := secret_place(raw):
        raise RecipeError(
            f"{path.name}: {place} holds what looks like a token or a password",
            "the recipe is copied into its run's folder, manifests and logs, where others may read it",
            "remove it, and export it instead: HF_TOKEN for the Hub, HTTPS_PROXY for a proxy",
        )
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise _explain(path, raw, error) from None
    check_references(recipe)
    return recipe


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with every default written out; loads again to an equal recipe."""
    return yaml.dump(
        recipe.model_dump(mode="json"), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=120
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file, unchecked.

    Raises:
        RecipeError: the file is missing or broken.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=RecipeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"the recipe {path} cannot be read ({error})",
            "a run is defined by its recipe",
            "give the path of a YAML file, or the name of a recipe that minima ships",
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(
            f"{path}{where}: {error.problem or error.context}",
            "the file is not valid YAML, so nothing in it can be trusted",
            "check that line: indentation, a missing colon or bracket, a key given twice",
        ) from None
    except RecursionError:
        raise _too_much(path, "its brackets are nested too deeply") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: {error}", "the file is not valid YAML", "fix or replace the file") from None
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{path} holds {'nothing' if raw is None else 'a ' + type(raw).__name__}, not keys and values",
            "a recipe has at least the keys `name` and `stages`",
            "see the shipped recipes/quickstart.yaml",
        )
    return _unshared(raw, path, itertools.count())


def _too_much(path: Path, what: str) -> RecipeError:
    return RecipeError(f"{path}: {what}", "no recipe needs that much", "check its brackets, anchors and aliases")


def _unshared(value: Any, path: Path, seen: Iterator[int], around: tuple[int, ...] = ()) -> Any:
    """A copy in which no block is shared through YAML anchors, so that an override changes one stage only."""
    if next(seen) > _MOST_VALUES:  # aliases of aliases can stand for any number of values
        raise _too_much(path, f"with its aliases written out it has more than {_MOST_VALUES:,} values")
    if not isinstance(value, dict | list):
        return value
    if id(value) in around:
        raise RecipeError(
            f"{path}: an anchor's value holds an alias of itself", "it would be infinite", "name another anchor there"
        )
    around = (*around, id(value))
    if isinstance(value, dict):
        return {key: _unshared(inner, path, seen, around) for key, inner in value.items()}
    return [_unshared(inner, path, seen, around) for inner in value]


def _explain(path: Path, raw: dict[str, Any], error: ValidationError) -> MinimaError:
    details = error.errors(include_url=False)
    details = [detail for detail in details if not _other_branch(detail, details)]
    own = [detail["ctx"]["error"] for detail in details if isinstance(detail.get("ctx", {}).get("error"), MinimaError)]
    if len(details) == 1 and own:
        place = _place(raw, details[0])
        return type(own[0])(f"{path.name}{': ' + place if place else ''}: {own[0].what}", own[0].why, own[0].do)
    lines = [f"{_place(raw, detail) or 'recipe'}: {problem(detail, Recipe)}" for detail in details]
    types = {detail["type"] for detail in details}
    why = "a run is defined by its recipe alone, so nothing is guessed"
    if "extra_forbidden" in types:
        why = "a key that nothing reads would be silently ignored"
    elif types == {"missing"}:
        why = "no default would be right for every run"
    return RecipeError(
        f"{path.name}: " + (lines[0] if len(lines) == 1 else f"{len(lines)} problems\n    " + "\n    ".join(lines)),
        why,
        "change " + ("it" if len(lines) == 1 else "them") + f" in {path}, or override on the command line",
    )


def _other_branch(detail: Any, details: list[Any]) -> bool:
    """Whether this only says that a block is not a union's plain value, while another error names the real problem."""
    if detail["type"] not in ("string_type", "model_type", "model_attributes_type"):
        return False
    if not isinstance(detail["input"], dict):
        return False
    *union, branch = detail["loc"]

    def of_another_block(other: Any) -> bool:
        place = other["loc"]
        if len(place) <= len(union) or list(place[: len(union)]) != union or other["type"] == "string_type":
            return False
        own = place[len(union)]
        return own != branch and str(own)[:1].isupper()  # pydantic calls a block by its class

    return any(map(of_another_block, details))


def _place(raw: dict[str, Any], detail: Any) -> str:
    """A pydantic location in the user's terms: stages by name, without union tags and class names."""
    location: Sequence[str | int] = detail["loc"]
    parts: list[str] = []
    block: Any = raw
    for index, part in enumerate(location):
        last = index == len(location) - 1
        if isinstance(block, list) and isinstance(part, int):
            block = block[part] if part < len(block) else None
            named = parts == ["stages"] and isinstance(block, dict) and isinstance(block.get("name"), str)
            parts.append(block["name"] if named else str(part))
        elif isinstance(block, dict) and part in block:
            parts.append(str(part))
            block = block[part]
        elif last and detail["type"] == "missing" and isinstance(block, dict):
            parts.append(str(part))
    return ".".join(parts)

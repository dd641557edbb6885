"""Write docs/recipe.md, every key of a recipe with its default and its meaning, from the classes that read a recipe.

python tools/make_recipe_reference.py
"""

import inspect
import json
import re
import types
import typing
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from minima.models.shape import ModelShape
from minima.recipe.base import ModelInput
from minima.recipe.chat import Align, Instruct
from minima.recipe.data import Source, TokenizerTraining
from minima.recipe.distillation import Distil, Teacher
from minima.recipe.loss_weights import WeightSchedule
from minima.recipe.pruning import Prune, PruneTarget
from minima.recipe.release import Answers, Benchmark, Evaluate, Export, Publish
from minima.recipe.schema import Adapt, BuildData, Recipe
from minima.recipe.training import Training
from minima.recipe.vocabulary import DonorTraining, ExpandVocabulary

PAGE = Path(__file__).parents[1] / "docs" / "recipe.md"
STAGES = (BuildData, ExpandVocabulary, Adapt, Prune, Distil, Instruct, Align, Evaluate, Export, Benchmark, Publish)
BLOCKS = (
    ModelInput,
    ModelShape,
    Teacher,
    WeightSchedule,
    Source,
    TokenizerTraining,
    DonorTraining,
    PruneTarget,
    Answers,
)
HEAD = """# Every key of a recipe

A recipe is one YAML file; `minima run RECIPE key.path=value` changes a key for one call, `minima run RECIPE --dry-run`
shows all of them with the values that they have. A key without a default has to be given. This page is written by
`python tools/make_recipe_reference.py`.
"""


def anchor(model: type[BaseModel]) -> str:
    """The heading's link on the page."""
    return title(model).strip("`").lower().replace(" ", "-").replace("`", "")


def title(model: type[BaseModel]) -> str:
    """A stage by its kind, a block in words."""
    kind = model.model_fields.get("kind")
    if kind is not None and model in STAGES:
        return f"`{typing.get_args(kind.annotation)[0]}`"
    return {Recipe: "The run", Training: "Every training stage"}.get(model) or re.sub(
        r"(?<!^)(?=[A-Z])", " ", model.__name__
    ).capitalize()


def type_text(annotation: typing.Any) -> str:
    """A type as a reader of YAML would put it; blocks are links."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_text(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_text(one) for one in arguments if one is not type(None)))
    if origin in (list, tuple):
        return f"list of {type_text(arguments[0])}"
    if origin is dict:
        return "names and values"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{title(annotation)}](#{anchor(annotation)})"
    return {str: "text", int: "whole number", float: "number", bool: "`true`, `false`", Path: "path"}[annotation]


def default_text(field: FieldInfo) -> str:
    """A default as YAML has it; nothing where there is none."""
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    assert value is not PydanticUndefined
    if value is None:
        return "-"
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_defaults=True)
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """What a class's docstring says of each of its own attributes; `a, b: ...` is said of both."""
    text = (inspect.getdoc(model) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?= {4}\S)", "\n" + text):
        names, _, meaning = " ".join(entry.split()).partition(": ")
        found |= dict.fromkeys(filter(None, re.split(r",\s*", names)), meaning)
    return found


def section(model: type[BaseModel], level: int) -> str:
    """A class's heading, first sentence and table; keys that every training stage has are in a section of their own."""
    told = {name: text for one in reversed(model.__mro__) if issubclass(one, BaseModel) for name, text in
            meanings(one).items()}  # fmt: skip
    shared = Training.model_fields.keys() if issubclass(model, Training) and model is not Training else ()
    rows = []
    for name, field in model.model_fields.items():
        if name in shared or (name == "kind" and model in STAGES) or (model in STAGES and name == "name"):
            continue
        kind = "list of the blocks below" if (model, name) == (Recipe, "stages") else type_text(field.annotation)
        rows.append(f"| `{name}` | {kind} | {default_text(field)} | {told[name].replace('|', chr(92) + '|')} |")
    first = (inspect.getdoc(model) or "").split("\n\n")[0].replace("\n", " ")
    also = " It has the keys of [every training stage](#every-training-stage), too." if shared else ""
    table = "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows]) if rows else ""
    return f"{'#' * level} {title(model)}\n{first}{also}\n\n{table}".rstrip() + "\n"


def page() -> str:
    """The whole page."""
    parts = [HEAD, section(Recipe, 2), "## Stages\nEach has a `name`, its folder in the run's, and a `kind`.\n"]
    parts += [section(Training, 3), *(section(stage, 3) for stage in STAGES), "## Blocks\n"]
    return "\n".join([*parts, *(section(block, 3) for block in BLOCKS)])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

"""Overrides from the command line (`key.path=value`), and the YAML loader that reads recipes and override values."""

import difflib
import re
from typing import Any

import yaml

from minima.errors import RecipeError

_MOST_MERGED = 100_000  # keys that the merges (`<<`) of a file may copy
_TAG = "tag:yaml.org,2002:"


class BoundedLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key that is given twice, and merges that would fill the memory."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._num_merged = 0

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # a date that does not exist, or a number of thousands of digits
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None
        except (LookupError, AttributeError):
            problem = f"{node.value!r} does not fit its tag {node.tag}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Apply merges (`<<`): a block's own keys win, then those of the block that is named first (YAML's merge type).

        Keys are compared as they are written. PyYAML's own way keeps every pair up to 6.0.3, which merges of merges
        multiply; in 6.0.4 the block that is named last wins.
        """
        merges = [value for key, value in node.value if key.tag == f"{_TAG}merge"]
        node.value = [pair for pair in node.value if pair[0].tag != f"{_TAG}merge"]  # first: a block may name itself
        for key, _ in node.value:
            if key.tag == f"{_TAG}value":
                key.tag = f"{_TAG}str"
        pairs: dict[Any, tuple[yaml.Node, yaml.Node]] = {}
        for merge in merges:
            for block in merge.value if isinstance(merge, yaml.SequenceNode) else [merge]:
                if not isinstance(block, yaml.MappingNode):
                    problem = f"only blocks of keys can be merged (`<<`), and this is a {block.id}"
                    raise yaml.constructor.ConstructorError(None, None, problem, block.start_mark)
                self.flatten_mapping(block)
                self._num_merged += len(block.value)
                if self._num_merged > _MOST_MERGED:
                    problem = f"up to here its merges (`<<`) copy more than {_MOST_MERGED:,} keys"
                    raise yaml.constructor.ConstructorError(None, None, problem, block.start_mark)
                for pair in block.value:
                    pairs.setdefault(_identity(pair[0]), pair)
        pairs |= {_identity(pair[0]): pair for pair in node.value}
        node.value = list(pairs.values())

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:  # before merges (`<<`) are applied: merged keys may be overridden
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key {key.value!r} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return node


def _identity(key: yaml.Node) -> Any:
    return (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)


class RecipeLoader(BoundedLoader):
    """`BoundedLoader` that reads `3e-4` and `126e9` as numbers."""


class RecipeDumper(yaml.SafeDumper):
    """Safe YAML in which text that `RecipeLoader` would read as a number is quoted."""


# YAML 1.1 requires a point and a signed exponent in a float; YAML 1.2 (core schema, section 10.3.2) does not.
for _class in (RecipeLoader, RecipeDumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)$"),
        list("-+.0123456789"),
    )


def nearest(name: str, known: list[str], likeness: float = 0.6) -> str:
    """`; did you mean 'x'?` for the known name that is closest to `name`; empty if none is close.

    Args:
        likeness: the least similarity, from 0 to 1, that counts as close.
    """
    close = difflib.get_close_matches(name, known, n=1, cutoff=likeness)
    return f"; did you mean {close[0]!r}?" if close else ""


def apply_override(raw: dict[str, Any], text: str) -> None:
    """Set one value of a recipe that is not checked yet, in place.

    Args:
        raw: the content of the recipe's YAML file.
        text: `key.path=value`. A stage is addressed by its name (`stages.student.steps=10`), an entry of another
            list by its number, from 0; the value is read as YAML.

    Raises:
        RecipeError: there is no `=`, no such stage or entry, or the value is broken YAML.
    """
    path, equals, value_text = text.partition("=")
    path = path.strip()
    if not equals or not all(path.split(".")):
        raise RecipeError(
            f"the override {text!r} is not of the form key.path=value",
            "the `=` separates the key from its new value",
            "write, for example, stages.student.steps=10 or ranks=4",
        )
    try:
        value = yaml.load(value_text, Loader=RecipeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"the override {text!r} has a value that is not YAML",
            "values are read as in a recipe",
            f"quote the value: {' '.join(str(error).split())}",
        ) from None
    parts = path.split(".")
    block: Any = raw
    if parts[0] == "stages" and len(parts) > 1:
        block, parts = _stage(raw, text, path.removeprefix("stages."))
    for part in parts[:-1]:
        block = _step(block, part, text)
    last = parts[-1]
    block[_entry(block, last, text) if isinstance(block, list) else last] = value


def _stage(raw: dict[str, Any], text: str, rest: str) -> tuple[dict[str, Any], list[str]]:
    stages = [stage for stage in raw.get("stages") or [] if isinstance(stage, dict)]
    by_name = {str(stage.get("name")): stage for stage in stages}
    for name in sorted(by_name, key=len, reverse=True):  # names may contain points, so the longest match is meant
        if rest.startswith(name + "."):
            return by_name[name], rest.removeprefix(name + ".").split(".")
    if rest in by_name:
        raise RecipeError(
            f"the override {text!r} names a stage, but none of its keys",
            "a stage cannot be replaced as a whole",
            f"write stages.{rest}.key=value",
        )
    name = rest.split(".")[0]
    raise RecipeError(
        f"the override {text!r} names no stage of this recipe{nearest(name, list(by_name))}",
        "it would change nothing",
        f"write stages.NAME.key=value with one of {', '.join(by_name)}",
    )


def _step(block: Any, part: str, text: str) -> Any:
    if isinstance(block, list):
        key: Any = _entry(block, part, text)
    else:
        key = part
        if isinstance(block.get(part), str) and part in ("model", "teacher", "reference"):  # a plain string is a source
            block[part] = {"source": block[part]}
        if block.get(part) is None:
            block[part] = {}
    if not isinstance(block[key], dict | list):
        raise RecipeError(
            f"the override {text!r} asks for a key of {part!r}, which is {block[key]!r}",
            "a single value has no keys",
            f"override {part!r} as a whole",
        )
    return block[key]


def _entry(block: list[Any], part: str, text: str) -> int:
    if part.isdigit() and int(part) < len(block):
        return int(part)
    raise RecipeError(
        f"the override {text!r} asks for entry {part!r} of a list of {len(block)}",
        "it would change nothing",
        f"give a number from 0 to {len(block) - 1}" if block else "override the list as a whole",
    )

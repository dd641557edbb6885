"""Load a recipe file and its overrides into a checked `Recipe`; every mistake is named with its place."""

import itertools
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from minima.errors import MinimaError, RecipeError
from minima.recipe.overrides import RecipeLoader, apply_override, nearest
from minima.recipe.references import check_references
from minima.recipe.schema import Recipe
from minima.recipe.secret import secret_place

_OF_A_STUDY = {"teachers", "students"}
_MOST_VALUES = 1_000_000  # the quickstart has some five hundred
_WANTED = {  # by the start of pydantic's error type
    "int_": "must be a whole number",
    "float_": "must be a number",
    "bool_": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list",
    "dict_type": "must be a block of keys",
    "model_type": "must be a block of keys",
}
_ELSEWHERE = {  # our names, and those that other trainers and configurations use for the same thing
    "activation_checkpointing": "gradient_checkpointing recompute",
    "batch_sequences": "batch_size train_batch_size global_batch_size",
    "checkpoint_every_steps": "save_steps save_interval",
    "compile": "torch_compile",
    "data": "dataset datasets train_dataset",
    "epochs": "num_train_epochs num_epochs",
    "evaluate_every_steps": "eval_steps eval_interval",
    "gradient_clip": "max_grad_norm grad_clip gradient_clipping",
    "keep_checkpoints": "save_total_limit",
    "learning_rate": "lr peak_lr",
    "log_every_steps": "logging_steps log_interval",
    "max_positions": "max_position_embeddings",
    "micro_batch_sequences": "per_device_train_batch_size micro_batch_size",
    "model": "model_name_or_path",
    "num_heads": "num_attention_heads n_head",
    "num_layers": "num_hidden_layers n_layer",
    "precision": "bf16 dtype torch_dtype",
    "schedule": "lr_scheduler_type lr_scheduler",
    "sequence_length": "seq_len seq_length max_length max_seq_length block_size",
    "steps": "max_steps num_steps train_iters",
    "teacher": "teacher_model_name_or_path teacher_model",
    "vocabulary_size": "vocab_size",
    "warmup_fraction": "warmup_ratio",
}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load the recipe in `path`, changed by `overrides`.

    Args:
        path: a YAML file.
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
        raw: keys and values.
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
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


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
    lines = [f"{_place(raw, detail) or 'recipe'}: {_problem(detail)}" for detail in details]
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


def _problem(detail: Any) -> str:
    value = detail["input"]
    if detail["type"] == "extra_forbidden":
        key = str(detail["loc"][-1])
        known = _known_names(detail["loc"][:-1])
        meant = [name for name, others in _ELSEWHERE.items() if key in others.split() and name in known]
        close = f"; did you mean {meant[0]!r}?" if meant else nearest(key, known)
        return f"no such key{close or '; known keys are ' + ', '.join(known)}"
    if detail["type"] in ("union_tag_invalid", "union_tag_not_found"):
        tag = detail["ctx"].get("tag")
        kinds = [kind.strip(" '") for kind in detail["ctx"].get("expected_tags", "").split(",") if kind.strip()]
        if tag is None:
            return "the stage has no kind"
        return f"kind {tag!r} is not known{nearest(tag, kinds)} (kinds are {', '.join(kinds)})"
    if detail["type"] == "missing":
        return "is missing"
    if detail["type"] == "string_pattern_mismatch":
        rule = "letters, digits, '_', '.' and '-', the first one a letter or a digit"
        return f"must be {'OWNER/NAME, each of ' if '/' in detail['ctx']['pattern'] else ''}{rule}, not {value!r}"
    inner = detail.get("ctx", {}).get("error")
    if isinstance(inner, MinimaError):
        return f"{inner.what} ({inner.why}; {inner.do})"
    wanted = next((text for start, text in _WANTED.items() if detail["type"].startswith(start)), None)
    message = wanted or detail["msg"].replace("Input should be", "must be").removeprefix("Value error, ")
    return f"{message[:1].lower() + message[1:]}, not {value!r}" if len(repr(value)) < 80 else message


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


def _known_names(location: Sequence[str | int]) -> list[str]:
    """The fields of the block at a pydantic location."""
    blocks: list[type[BaseModel]] = [Recipe]
    for part in location:
        if isinstance(part, int):
            continue
        holders = [block for block in blocks if part in block.model_fields]
        tagged = [block for block in blocks if _kind(block) == part or block.__name__ == part]
        if tagged:
            blocks = tagged
        elif holders:
            blocks = [inner for block in holders for inner in _models(block.model_fields[part].annotation)]
    return sorted({name for block in blocks for name in block.model_fields})


def _kind(block: type[BaseModel]) -> str | None:
    field = block.model_fields.get("kind")
    return (typing.get_args(field.annotation) or (None,))[0] if field else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in typing.get_args(annotation) for model in _models(inner)]

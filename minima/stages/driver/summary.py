"""A run's results: `summary.json` from the stages' manifests, as defined by the recipe's `summary` block."""

from pathlib import Path
from typing import Any

from minima.disk import write_json
from minima.errors import RecipeError
from minima.recipe.references import STEPPED
from minima.recipe.schema import Recipe
from minima.stages.manifest import STARTED, is_finished, read_manifest


def write_summary(recipe: Recipe, folder: Path) -> dict[str, Any] | None:
    """Write `summary.json` once every stage is finished, and return its content; None before that.

    Besides what the recipe asks for, it contains `tokens` (trained on by all training stages; if `patience` chose an
    earlier checkpoint, only those up to it), `seconds` (work of all stages over all their starts, excluding process
    startup) and `export` (path of each export stage's model).

    Raises:
        RecipeError: the recipe asks for a metric that its stage did not measure, or to average something that is not a
            number.
    """
    if not all(is_finished(folder / stage.name) for stage in recipe.stages):
        return None
    manifests = {stage.name: read_manifest(folder / stage.name) for stage in recipe.stages}
    metrics = {name: manifest.get("metrics") or {} for name, manifest in manifests.items()}
    summary = {key: _resolve(value, metrics, key) for key, value in recipe.summary.items()}
    trained = [metrics[stage.name].get("tokens", 0) for stage in recipe.stages if stage.kind in STEPPED]
    summary["tokens"] = sum(trained)
    summary["seconds"] = round(sum(manifest["seconds"] for manifest in manifests.values()), 1)
    exports = {stage.name: str(folder / stage.name / "model") for stage in recipe.stages if stage.kind == "export"}
    if exports:
        summary["export"] = exports
    write_json(folder / "summary.json", summary)
    return summary


def stage_rows(recipe: Recipe, folder: Path) -> list[dict[str, Any]]:
    """One row for each stage: name, kind, state, and the seconds and metrics from its manifest."""
    rows = []
    for stage in recipe.stages:
        own = folder / stage.name
        row: dict[str, Any] = {"stage": stage.name, "kind": stage.kind, "seconds": None, "metrics": {}}
        if is_finished(own):
            manifest = read_manifest(own)
            row |= {"state": "finished", "seconds": manifest["seconds"], "metrics": manifest.get("metrics") or {}}
        else:
            row["state"] = "begun" if (own / STARTED).is_file() else "not begun"
        rows.append(row)
    return rows


def _resolve(value: Any, metrics: dict[str, Any], where: str) -> Any:
    if isinstance(value, dict):
        return {key: _resolve(inner, metrics, f"{where}.{key}") for key, inner in value.items()}
    if isinstance(value, list):
        return _mean([_resolve(inner, metrics, where) for inner in value], value, where)
    return _look_up(metrics, value, value, where)


def _mean(numbers: list[Any], names: list[str], where: str) -> float:
    for number, name in zip(numbers, names, strict=True):
        if not isinstance(number, int | float):
            text = repr(number)
            raise RecipeError(
                f"summary.{where}: {name!r} is not a number but {text if len(text) <= 80 else text[:77] + '...'}",
                "a list is averaged, and summary.json is not written without its mean",
                f"name it alone ({where}: {name}), or name numbers; finished stages are not run again",
            )
    return sum(numbers) / len(numbers)


def _look_up(block: Any, path: str, whole: str, where: str) -> Any:
    if not path:
        return block
    keys = sorted(block, key=len, reverse=True) if isinstance(block, dict) else []
    for key in keys:  # a key may contain a dot (a stage's name, a path), so the longest match wins
        if path == key or path.startswith(f"{key}."):
            return _look_up(block[key], path[len(key) + 1 :], whole, where)
    raise RecipeError(
        f"summary.{where}: {whole!r} was not measured ({path!r} is not among {', '.join(keys) or 'any metrics'})",
        "summary.json would lack what the recipe asks for",
        "fix the recipe's summary block and run again; finished stages are not run again",
    )

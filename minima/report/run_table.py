"""The table at the end of a run."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from minima.report.tables import text_table

# The metrics that a stage's row shows; its manifest has all of them.
_SHOWN = ("documents", "parameters", "tokens", "held_out_loss")


def run_table(stages: Sequence[Mapping[str, Any]], summary: Mapping[str, Any] | None) -> str:
    """The result of each stage and, once the run is finished, its summary.

    Args:
        stages: `stage`, `kind`, `state`, `seconds` and `metrics` of each.
        summary: content of `summary.json`; None while stages are left.
    """
    rows = []
    for stage in stages:
        seconds = "" if stage["seconds"] is None else f"{stage['seconds']:.1f}"
        rows.append([stage["stage"], stage["kind"], stage["state"], seconds, _result(stage["metrics"])])
    table = text_table(rows, ("stage", "kind", "state", "seconds", "result"))
    if summary is None:
        return f"\n{table}\n"
    return f"\n{table}\n\n{text_table(flat(summary), ('summary', 'value'))}\n"


def _result(metrics: Mapping[str, Any]) -> str:
    losses = [value["loss"] for value in metrics.values() if isinstance(value, Mapping) and "loss" in value]
    if losses:  # an evaluation: a set of scores for each model
        return f"{len(losses)} models, loss {number(min(losses))} to {number(max(losses))}"
    scores = [value for value in metrics.items() if isinstance(value[1], Mapping) and "score" in value[1]]
    if scores:  # a benchmark
        left_out = metrics.get("left_out") or []
        return ", ".join([*(f"{name} {_percent(value)}" for name, value in scores), *(f"no {it}" for it in left_out)])
    if "url" in metrics:
        return str(metrics["url"])
    shown = [f"{key} {number(metrics[key])}" for key in _SHOWN if isinstance(metrics.get(key), int | float)]
    return ", ".join(shown)


def _percent(found: Mapping[str, Any]) -> str:
    return f"{100.0 * found['score']:.1f} %" + (f" of {found['items']} items only" if found.get("limited") else "")


def flat(block: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    """Flatten nested values into rows of `outer.inner` and a formatted value."""
    rows: list[list[str]] = []
    for key, value in block.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{key}.")
        else:
            rows.append([f"{prefix}{key}", number(value)])
    return rows


def number(value: Any) -> str:
    """Format a value for display: thousands separators, four decimals, an exponent for small numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    if isinstance(value, int) or (value == int(value) and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:,.4f}" if abs(value) >= 1e-3 or value == 0 else f"{value:.3g}"

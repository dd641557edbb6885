"""The table that ends a run."""

from collections.abc import Mapping, Sequence
from typing import Any

# Of a stage's metrics, those that its row shows; all of them are in its manifest.
_SHOWN = ("documents", "parameters", "tokens", "loss", "held_out_loss", "held_out_tokens")
_WIDTH = 100  # characters of a row's result


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns, the first row being the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def run_table(stages: Sequence[Mapping[str, Any]], summary: Mapping[str, Any] | None) -> str:
    """What each stage came to and, once the run is over, its summary.

    Args:
        stages: `stage`, `kind`, `state`, `seconds` and `metrics` of each.
        summary: content of `summary.json`; None while stages are left.
    """
    rows = [["stage", "kind", "state", "seconds", "result"]]
    for stage in stages:
        seconds = "" if stage["seconds"] is None else f"{stage['seconds']:.1f}"
        result = _result(stage["metrics"])
        rows.append([stage["stage"], stage["kind"], stage["state"], seconds, result])
    table = aligned(rows)
    if summary is None:
        return f"\n{table}\n"
    return f"\n{table}\n\n{aligned([['summary', 'value'], *flat(summary)])}\n"


def _result(metrics: Mapping[str, Any]) -> str:
    shown = [f"{key} {number(metrics[key])}" for key in _SHOWN if isinstance(metrics.get(key), int | float)]
    if not shown:  # an evaluation: one block of numbers for each model
        blocks = {
            key: value["loss"] for key, value in metrics.items() if isinstance(value, Mapping) and "loss" in value
        }
        shown = [f"loss of {key} {number(value)}" for key, value in blocks.items()]
    text = ", ".join(shown)
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."


def flat(block: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    """Nested names and values as rows of `outer.inner` and a readable value."""
    rows: list[list[str]] = []
    for key, value in block.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{key}.")
        else:
            rows.append([f"{prefix}{key}", number(value)])
    return rows


def number(value: Any) -> str:
    """A value for a person: thousands separated, four decimals, small numbers with an exponent."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (value == int(value) and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:,.4f}" if abs(value) >= 1e-3 or value == 0 else f"{value:.3g}"

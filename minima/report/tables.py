"""Aligned tables for a terminal or a log, and the same tables in Markdown. No torch."""

from collections.abc import Sequence
from typing import Any


def text_table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """A table with aligned columns: numbers to the right, everything else to the left.

    Args:
        rows: cells; None is shown as `-`, integers with thousands separators, other numbers with four decimals.
    """
    cells = [[str(header) for header in headers], *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    right = [_is_numeric([row[column] for row in rows]) for column in range(len(headers))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(_line(row, widths, right).rstrip() for row in cells)


def markdown_table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """The same table in Markdown, as rendered by GitHub and the Hub."""
    right = [_is_numeric([row[column] for row in rows]) for column in range(len(headers))]
    lines = [[str(header) for header in headers], ["---:" if number else "---" for number in right]]
    lines += [[" ".join(_cell(value).split()).replace("|", "\\|") for value in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _line(row: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    return "  ".join(
        cell.rjust(width) if number else cell.ljust(width)
        for cell, width, number in zip(row, widths, right, strict=True)
    )


def _is_numeric(values: Sequence[Any]) -> bool:
    return any(isinstance(value, int | float) for value in values) and all(
        value is None or isinstance(value, int | float) for value in values
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"

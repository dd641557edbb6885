"""Format and parse numbers of parameters, tokens and FLOPs as people write them."""

import math

from minima.errors import TableError

_UNITS = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def short(value: float) -> str:
    """Three digits and a unit: 546M, 2.70B, 85.3k."""
    for unit, factor in reversed(_UNITS.items()):
        if abs(value) >= 0.9995 * factor:
            scaled = float(f"{value / factor:.3g}")
            return f"{scaled:.{max(0, 2 - math.floor(math.log10(abs(scaled))))}f}{unit}"
    return f"{value:.0f}"


def parse_number(text: str, option: str) -> float:
    """Parse a positive number as typed: `2.7e9`, `2700000000` or `2.7B`.

    Raises:
        TableError: it is not one.
    """
    text = text.strip()
    factor = _UNITS.get(text[-1:], 1.0)
    try:
        value = float(text[:-1] if factor != 1.0 else text) * factor
        if math.isfinite(value) and value > 0:
            return value
    except ValueError:
        pass
    raise TableError(
        f"{option} {text!r} is not a positive number",
        "the laws are about numbers of parameters and tokens",
        "write it like 2.7e9 or 2.7B",
    )

"""Bytes and FLOPs as readable text."""


def flops_text(flops: float) -> str:
    """FLOPs, also in petaflop/s-days, a unit that does not depend on hardware."""
    return f"{flops:.3e} ({flops / 1e15 / 86400:.3g} petaflop/s-days)"


def size_text(size_bytes: int) -> str:
    """Bytes in a readable unit; units are powers of 1,000, as for disks."""
    return scaled(size_bytes, "bytes", "kB", "MB", "GB", "TB", "PB")


def scaled(value: float, *units: str) -> str:
    """Three digits and one of the units, each of which is 1,000 times the one before it."""
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"

"""Bytes and FLOPs as readable text."""


def flops_text(flops: float) -> str:
    """FLOPs, also in petaflop/s-days, a unit that does not depend on hardware."""
    return f"{flops:.3e} ({flops / 1e15 / 86400:.3g} petaflop/s-days)"


def size_text(size_bytes: int) -> str:
    """Bytes in a readable unit; units are powers of 1,000, as for disks."""
    size, units = float(size_bytes), ["bytes", "kB", "MB", "GB", "TB", "PB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}"

"""Bytes and FLOPs as a person reads them."""


def flops_text(flops: float) -> str:
    """FLOPs with the days that they take at a petaflop per second, a unit that needs no hardware named."""
    return f"{flops:.3e} ({flops / 1e15 / 86400:.3g} petaflop/s-days)"


def size_text(size_bytes: int) -> str:
    """Bytes in the unit that a person reads easily; units are powers of 1,000, as disks are sold."""
    size, units = float(size_bytes), ["bytes", "kB", "MB", "GB", "TB", "PB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}"

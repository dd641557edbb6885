"""Bitwise reproducible runs on the same devices."""

import torch


def fix_bits() -> None:
    """Use deterministic algorithms only; from here on, an operation that has none raises.

    In this mode PyTorch also fills every new tensor with NaN, to expose reads of uninitialised memory. That is turned
    off: CPU runs are compared bit for bit without it, and it is nearly all that the mode costs there: 3.9 % of a step
    with it, 0.1 % without (the row `fixed bits` of `tools/bench_checkpoint.py`).
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

"""The same bits in every run on the same devices."""

import torch


def fix_bits() -> None:
    """Take operations that give the same bits in each run; one that has no such way raises from here on.

    PyTorch would also fill every new tensor with NaN, so that whoever reads what was never written is found. Nothing
    here does, and the filling is nearly all that fixed bits cost a step on a CPU: 4 % of it, of gathered weights and
    chunks of logits above all (`tools/bench_checkpoint.py`).
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

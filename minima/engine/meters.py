"""Sums that stay on the device between log lines, reduced over the ranks once per line."""

import torch
from torch import Tensor

from minima.engine.distributed import all_reduce_sum
from minima.losses import LossSum


class Meters:
    """Running sums since the last log line."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = torch.zeros((), dtype=torch.int64, device=self.device)
        self._seconds = 0.0
        self._steps = 0
        self._norm = self._learning_rate = 0.0

    def add(self, loss: LossSum) -> None:
        """Add one micro-batch's sums; nothing is copied to the host."""
        for name, value in (("loss", loss.total), *loss.parts.items()):
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += loss.count

    def step(self, gradient_norm: float, learning_rate: float, seconds: float) -> None:
        """Close one optimiser step."""
        self._norm, self._learning_rate = gradient_norm, learning_rate
        self._seconds += seconds
        self._steps += 1

    def losses(self) -> dict[str, float]:
        """Only the means of `reduce`; like it, must be called on every rank, and clears the sums."""
        names = list(self._sums)
        return {name: value for name, value in self.reduce().items() if name in names}

    def reduce(self) -> dict[str, float]:
        """Means over the valid tokens of all ranks since the last call (nats), and figures of the last step.

        Every rank must call it; it clears the sums. `tokens` counts valid tokens, `seconds` this rank's time in steps.
        """
        names = list(self._sums)
        packed = torch.stack([*(self._sums[name] for name in names), self._count.double()])
        values = all_reduce_sum(packed).tolist()
        tokens = values.pop()
        record = {name: value / max(tokens, 1.0) for name, value in zip(names, values, strict=True)}
        record |= {"gradient_norm": self._norm, "learning_rate": self._learning_rate}
        record |= {"tokens": tokens, "seconds": self._seconds, "steps": float(self._steps)}
        self._clear()
        return record

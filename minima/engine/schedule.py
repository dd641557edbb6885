"""The learning rate of each step."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to the peak, then a decay to a fraction of it.

    Attributes:
        total_steps: optimiser steps of the run.
        peak: learning rate at the end of the warm-up.
        warmup_steps: steps of the warm-up; the first step already has a rate above zero.
        kind: form of the decay.
        final_fraction: fraction of the peak at which the decay ends, after the last step.
    """

    total_steps: int
    peak: float
    warmup_steps: int
    kind: Literal["cosine", "linear", "constant"]
    final_fraction: float

    def learning_rate(self, step: int) -> float:
        """The learning rate of update `step`; the first is 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        decay = 1 - progress if self.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.peak * (self.final_fraction + (1 - self.final_fraction) * decay)

"""The weight of one part of a loss, which may change from step to step. No torch."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from minima.errors import RecipeError
from minima.recipe.base import Strict

_KEYS = {
    "constant": ("value",),
    "linear": ("start", "end"),
    "warmup_stable_decay": ("start", "peak", "end", "warmup_fraction", "decay_fraction"),
}


class WeightSchedule(Strict):
    """A weight that depends only on the step's number, so that a resumed run has the same weights.

    Attributes:
        schedule: `constant`, `value` at every step; `linear`, from `start` at the first step to `end` at the last one
            (a single step has `start`); `warmup_stable_decay`, from `start` to `peak`, which is held, then to `end`,
            reached at the last step.
        value: the weight, for `constant`.
        start: the first weight, for `linear` and `warmup_stable_decay`.
        peak: the weight that is held, for `warmup_stable_decay`.
        end: the last weight, for `linear` and `warmup_stable_decay`.
        warmup_fraction: fraction of all steps before the peak; for `warmup_stable_decay`.
        decay_fraction: fraction of all steps after the peak; for `warmup_stable_decay`.
    """

    schedule: Literal["constant", "linear", "warmup_stable_decay"]
    value: float | None = Field(default=None, ge=0)
    start: float | None = Field(default=None, ge=0)
    peak: float | None = Field(default=None, ge=0)
    end: float | None = Field(default=None, ge=0)
    warmup_fraction: float | None = Field(default=None, ge=0, le=1)
    decay_fraction: float | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="after")
    def _its_keys(self) -> Self:
        given = {name for name in type(self).model_fields if name != "schedule" and getattr(self, name) is not None}
        wanted = _KEYS[self.schedule]
        if given != set(wanted):
            missing = [name for name in wanted if name not in given]
            other = sorted(given - set(wanted))
            raise RecipeError(
                f"a weight with schedule {self.schedule}"
                + (f" without {' and '.join(missing)}" if missing else "")
                + (f" with {' and '.join(other)}" if other else ""),
                "each schedule needs all of its own keys, and no others",
                f"give {', '.join(wanted)} and nothing else",
            )
        if (self.warmup_fraction or 0) + (self.decay_fraction or 0) > 1:
            raise RecipeError(
                f"a weight with warmup_fraction {self.warmup_fraction} and decay_fraction {self.decay_fraction}",
                "together they are more than all steps",
                "make their sum at most 1",
            )
        return self

    def at(self, step: int, total_steps: int) -> float:
        """The weight at update `step`; the first is 0."""
        if self.schedule == "constant":
            assert self.value is not None
            return self.value
        assert self.start is not None and self.end is not None
        if self.schedule == "linear":
            return _between(self.start, self.end, step / max(1, total_steps - 1))
        assert self.peak is not None and self.warmup_fraction is not None and self.decay_fraction is not None
        warmup = round(self.warmup_fraction * total_steps)
        decay = min(round(self.decay_fraction * total_steps), total_steps - warmup)
        if step < warmup:
            return _between(self.start, self.peak, step / warmup)
        if step < total_steps - decay:
            return self.peak
        return _between(self.peak, self.end, (step + 1 - (total_steps - decay)) / decay)


def weight_at(weight: float | WeightSchedule, step: int, total_steps: int) -> float:
    """The value of a weight, a number or a schedule, at update `step`; the first is 0."""
    return weight.at(step, total_steps) if isinstance(weight, WeightSchedule) else weight


def _between(start: float, end: float, share: float) -> float:
    return start * (1 - share) + end * share  # exact at both ends


def _which(value: Any) -> str:
    return "WeightSchedule" if isinstance(value, (dict, WeightSchedule)) else "number"


# A number or a schedule, told apart first, so that an error is about the one that was meant.
Weight = Annotated[
    Annotated[float, Field(ge=0), Tag("number")] | Annotated[WeightSchedule, Tag("WeightSchedule")],
    Discriminator(_which),
]

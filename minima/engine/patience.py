"""When to end early: held-out losses that no longer fall."""


class Patience:
    """Remembers a run's held-out losses.

    Args:
        limit: so many in a row that are no better than the best one end the run; None never does.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.best: float | None = None
        self.best_step: int | None = None
        self._worse = 0

    def add(self, step: int, loss: float) -> None:
        """The held-out loss after `step` updates."""
        if self.best is None or loss < self.best:
            self.best, self.best_step, self._worse = loss, step, 0
        else:
            self._worse += 1

    def state(self) -> dict[str, float | int | None]:
        """What a checkpoint keeps."""
        return {"best": self.best, "best_step": self.best_step, "worse": self._worse}

    def restore(self, state: dict[str, float | int | None]) -> None:
        """Go on from what a checkpoint has kept."""
        best_step = state["best_step"]
        self.best, self.best_step = state["best"], None if best_step is None else int(best_step)
        self._worse = int(state["worse"] or 0)

    @property
    def spent(self) -> bool:
        """Whether the run is to end."""
        return self.limit is not None and self._worse >= self.limit

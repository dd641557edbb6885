"""Early stopping: end a run when its held-out loss no longer falls."""


class Patience:
    """Keeps track of a run's held-out losses.

    Args:
        limit: number of losses in a row, none better than the best one, that ends the run; None: never.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.best: float | None = None
        self.best_step: int | None = None
        self._worse = 0

    def add(self, step: int, loss: float) -> None:
        """Record the held-out loss after `step` updates."""
        if self.best is None or loss < self.best:
            self.best, self.best_step, self._worse = loss, step, 0
        else:
            self._worse += 1

    def state(self) -> dict[str, float | int | None]:
        """The state to keep in a checkpoint."""
        return {"best": self.best, "best_step": self.best_step, "worse": self._worse}

    def restore(self, state: dict[str, float | int | None]) -> None:
        """Restore the state from a checkpoint."""
        best_step = state["best_step"]
        self.best, self.best_step = state["best"], None if best_step is None else int(best_step)
        self._worse = int(state["worse"] or 0)

    @property
    def spent(self) -> bool:
        """Whether the run should end."""
        return self.limit is not None and self._worse >= self.limit

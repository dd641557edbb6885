"""Progress output while a stage runs: a bar on a terminal, plain lines in a log. No torch."""

import os
import signal
import sys
import time
from typing import TextIO

from minima.console import outliving_readers

BAR_CELLS = 24


class Progress:
    """Prints a new line for each update in a log, and redraws a single line on a terminal.

    Args:
        first_step: finished steps at the (re)start.
        columns: width of the terminal; 0 if the output is not a terminal.
    """

    def __init__(
        self, label: str, total_steps: int, first_step: int = 0, *, columns: int = 0, stream: TextIO | None = None
    ) -> None:
        self.label, self.total_steps, self.first_step = label, total_steps, first_step
        self.columns = columns
        self.stream = stream or sys.stdout
        self._started = time.monotonic()
        self._drawn = False

    def update(self, step: int, facts: dict[str, str]) -> None:
        """Show that `step` steps are done.

        Args:
            facts: formatted values to show on the line, by name.
        """
        shown = "  ".join(f"{name} {value}" for name, value in facts.items())
        left = duration(self._seconds_left(step))
        if not self.columns:
            self._write(f"{self.label}: step {step}/{self.total_steps}  {shown}  left {left}\n")
            return
        filled = round(BAR_CELLS * step / self.total_steps)
        bar = "█" * filled + "░" * (BAR_CELLS - filled)
        line = f"{self.label} {bar} {step}/{self.total_steps}  {shown}  left {left}"
        self._write("\r" + line[: self.columns - 1].ljust(self.columns - 1))
        self._drawn = True

    def note(self, text: str) -> None:
        """Print a separate line that the bar does not overwrite."""
        self._write(("\n" if self._drawn else "") + f"{self.label}: {text}\n")
        self._drawn = False

    def close(self) -> None:
        """End the bar's line."""
        if self._drawn:
            self._write("\n")
        self._drawn = False

    def _seconds_left(self, step: int) -> float:
        done = step - self.first_step
        return (time.monotonic() - self._started) / done * (self.total_steps - step) if done else 0.0

    def _write(self, text: str) -> None:
        # If the driver was killed, nobody reads the output: the rank then ends as after a SIGTERM, saving everything.
        with outliving_readers(lambda: os.kill(os.getpid(), signal.SIGTERM)):
            self.stream.write(text)
            self.stream.flush()


def duration(seconds: float) -> str:
    """Format seconds as `12s`, `3m05s`, `2h07m` or `4d03h`."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600:02d}h"

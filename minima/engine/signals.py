"""SIGTERM, SIGINT and SIGHUP as requests to end after the current step, with everything saved."""

import os
import signal
import threading
import time
from types import FrameType

from minima.console import stop_signals

# Launchers forward a signal to ranks that already have it (a cancelled Slurm step, or Ctrl-C in a terminal, reaches the
# launcher and its ranks at once), so a second signal this soon is still the first.
_SAME_SECONDS = 2.0


class StopRequest:
    """Whether this rank has been asked to end. Made once, before training; the ranks agree in the loop.

    From `listen` on, the first signal is only noted. A second one that is not the first one's echo ends the process at
    once with exit code 128 plus its number; what was complete on disk stays complete. A SIGHUP, sent when the terminal
    closes, never counts as the second.

    Attributes:
        signal: number of the first signal received; 0 for none.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._since = 0.0

    @property
    def requested(self) -> bool:
        """Whether a signal has been received."""
        return self.signal != 0

    def listen(self) -> "StopRequest":
        """Handle the signals from now until the process ends: a late one must not cut off the last save.

        Outside the main thread, where Python cannot handle signals, this does nothing.
        """
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                signal.signal(number, self._note)
        return self

    def leave(self) -> None:
        """Restore the signals' default handling."""
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signal:
            self.signal, self._since = number, now
        elif number != signal.SIGHUP and now - self._since > _SAME_SECONDS:
            os._exit(128 + number)

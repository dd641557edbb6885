"""SIGTERM, SIGINT and SIGHUP as a wish to end at the next step's edge, with everything saved."""

import os
import signal
import threading
import time
from types import FrameType

from minima.console import stop_signals

# Launchers hand a signal on to ranks that had it already (a cancelled Slurm step, or Ctrl-C in a terminal, reaches the
# launcher and its ranks at once), so a second one this soon is still the first.
_SAME_SECONDS = 2.0


class StopRequest:
    """Whether this rank has been asked to end. Made once, before training; the ranks agree in the loop.

    From `listen` on, the first signal is only noted. A second one, not just the first one's echo, ends the process at
    once with 128 plus its number: what was complete on disk stays as it is. Only a terminal that goes is no second one.

    Attributes:
        signal: number of the signal that came; 0 for none.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._since = 0.0

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal != 0

    def listen(self) -> "StopRequest":
        """Take the signals from now on, to the end of the process: one that comes late must not cut off a last save.

        Outside of the main thread, where Python takes no signals, this does nothing.
        """
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                signal.signal(number, self._note)
        return self

    def leave(self) -> None:
        """Give the signals back their usual meaning."""
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signal:
            self.signal, self._since = number, now
        elif number != signal.SIGHUP and now - self._since > _SAME_SECONDS:
            os._exit(128 + number)

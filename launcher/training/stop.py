"""A request to stop: a signal sets a flag; the ranks agree on the step after which to act on it."""

from __future__ import annotations

import signal
from types import FrameType

__all__ = ["StopRequest"]

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
"""Ctrl-C, a polite kill, and what schedulers send ahead of a time limit."""


class StopRequest:
    """Whether this process has been asked to stop."""

    def __init__(self) -> None:
        self.requested = False

    def listen(self) -> None:
        """Handle the stop signals, and take those that were held back while the process started."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

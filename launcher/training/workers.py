"""What a DataLoader process does about signals and about its parent's death."""

from __future__ import annotations

import signal

from launcher.orphans import die_with_parent
from launcher.training.stop import STOP_SIGNALS

__all__ = ["leave_signals_to_parent"]


def leave_signals_to_parent(worker_id: int) -> None:
    """Ignore the stop signals: a scheduler's signal reaches every process, but only ranks act on it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()

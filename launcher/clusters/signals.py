"""The signals that ask for a stop, and how they wait for what must not be interrupted."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["STOP_SIGNALS", "held_back"]

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)


@contextmanager
def held_back() -> Iterator[None]:
    """No handler of such a signal runs in here, and no child started here dies of one; it takes effect afterwards."""
    noted: list[int] = []
    # Blocked for the children, which inherit that, and noted here, as any thread of this process may be given a signal.
    heard = [number for number in STOP_SIGNALS if callable(signal.getsignal(number))]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    handlers = {number: signal.signal(number, lambda number, frame: noted.append(number)) for number in heard}
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in noted:
            signal.raise_signal(late)

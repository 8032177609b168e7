"""Threads that end with whom they serve, and before the interpreter does.

A thread that wakes while the interpreter is taken down ends the process with an abort; one that holds whom it serves
keeps it, and all its buffers, for ever.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

__all__ = ["serve"]


def serve(owner: object, name: str, work: Callable[[], None], stop: Callable[[], None], seconds: float) -> None:
    """Run ``work`` in a thread until ``owner`` is gone, or the interpreter ends.

    Args:
        owner: that neither ``work``, while it has nothing to do, nor ``stop`` refers to.
        name: the thread's.
        work: returns soon after ``stop`` was called.
        stop: called when it is time.
        seconds: how long to wait for the thread then: it may wait for a peer that is gone.
    """
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    weakref.finalize(owner, _end, thread, stop, seconds)


def _end(thread: threading.Thread, stop: Callable[[], None], seconds: float) -> None:
    stop()
    if thread is not threading.current_thread():
        thread.join(seconds)

"""Which attempt at a run is the current one. One that no longer is writes nothing that others go by, and ends.

Locks end with their process, but only where the kernel, or the file server, learns of its end: a node that the
scheduler has given up may live on, cut off. So each attempt writes its number into the run directory as it begins, and
whoever publishes something for an attempt looks whether a later one has.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass

from launcher.rundir.layout import RunDirectory
from launcher.rundir.records import read_json, write_json

__all__ = ["Fence", "current_attempt"]


@dataclass(frozen=True)
class Fence:
    """One attempt's claim to be the current one."""

    run: RunDirectory
    attempt: int

    def put_up(self) -> None:
        """Be the current attempt from now on."""
        claim = {"attempt": self.attempt, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        write_json(self.run.fence, claim)

    def holds(self) -> bool:
        """Whether no later attempt has begun. A file that cannot be read says nothing, and stops nobody."""
        return current_attempt(self.run) <= self.attempt


def current_attempt(run: RunDirectory) -> int:
    """The number of the attempt that began last; -1 if it is not known."""
    try:
        return int(read_json(run.fence)["attempt"])
    except (OSError, KeyError, TypeError, ValueError):
        return -1

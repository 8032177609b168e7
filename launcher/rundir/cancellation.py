"""A request to cancel a run, left in its directory, so that what ends it can say by whom, and whether to save."""

from __future__ import annotations

import getpass
import socket
import time
from dataclasses import asdict, dataclass

from launcher.rundir.layout import RunDirectory
from launcher.rundir.records import read_json, write_json

__all__ = ["Cancellation", "is_cancelled_at_once"]


@dataclass(frozen=True)
class Cancellation:
    """What ``launch cancel`` asks for."""

    save: bool
    """Whether to stop after a step and save, or at once."""
    requeue: bool = False
    """On SLURM, having saved: whether the job is to go on by itself."""
    user: str = ""
    host: str = ""
    time: float = 0.0
    """Seconds since 1970."""

    @classmethod
    def ask(cls, run: RunDirectory, save: bool, requeue: bool = False) -> Cancellation:
        """Leave a request."""
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # a user id without a name
            user = "somebody"
        request = cls(save, requeue, user, socket.gethostname(), time.time())
        write_json(run.cancellation, asdict(request))
        return request

    @classmethod
    def read(cls, run: RunDirectory) -> Cancellation | None:
        """The request; None if there is none."""
        try:
            return cls(**read_json(run.cancellation))
        except (OSError, ValueError, TypeError):
            return None

    @staticmethod
    def clear(run: RunDirectory) -> None:
        """What was asked of an earlier launch does not concern the next."""
        run.cancellation.unlink(missing_ok=True)

    def __str__(self) -> str:
        saved = " --save" if self.save else ""
        done = "asked for" if self.requeue else "cancelled"
        return f"{done} by {self.user} on {self.host} (launch cancel{saved})"


def is_cancelled_at_once(run: RunDirectory) -> bool:
    """Whether the run is to end without saving."""
    request = Cancellation.read(run)
    return request is not None and not request.save

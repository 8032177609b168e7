"""``status.json``: what a run is doing, for whoever looks from outside.

One process writes it at a time: the launching process before and after an attempt, rank 0 during one.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from launcher.rundir.records import damaged, read_json, write_json

__all__ = ["State", "Status"]


class State(str, Enum):
    """The life of a run."""

    submitted = "submitted"
    running = "running"
    stopping = "stopping"
    resumable = "resumable"
    finished = "finished"
    failed = "failed"


@dataclass(frozen=True)
class Status:
    """The content of ``status.json``."""

    state: State
    attempt: int = 0
    step: int = 0
    hosts: tuple[str, ...] = ()
    job_id: str | None = None
    reason: str | None = None
    updated: float = field(default_factory=time.time)
    """Seconds since 1970."""

    def write(self, path: Path) -> None:
        """Replace the file as a whole."""
        write_json(path, {**asdict(self), "state": self.state.value})

    @classmethod
    def read(cls, path: Path) -> Status:
        """The status that was written last.

        Raises:
            OSError: it cannot be read.
            RunError: it is not a status.
        """
        content: dict[str, Any] = read_json(path)
        try:
            return cls(**{**content, "state": State(content["state"]), "hosts": tuple(content["hosts"])})
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(path, "it does not hold a run's state") from error

    def now(self, state: State, **changes: Any) -> Status:
        """The same run, later."""
        return replace(self, state=state, updated=time.time(), **changes)

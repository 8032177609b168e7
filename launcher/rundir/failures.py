"""Why a rank failed, as one file per rank, and which of several failures came first."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.errors import EXIT_FAILED, EXIT_REQUEST, RequestError, TrainingError
from launcher.rundir.layout import RunDirectory
from launcher.rundir.records import read_json, write_json

__all__ = ["Failure", "first_failure"]

_REASON_LENGTH = 400
"""Some libraries put a traceback into their message; the log has it whole."""


@dataclass(frozen=True)
class Failure:
    """One rank's end, in words."""

    rank: int
    host: str
    log: str
    message: str
    """The exception's last line, ``ValueError: …``, or how the process died."""
    traceback: str = ""
    """Empty where there is none, or where it would not help: a wrong request, a diagnosis of ours."""
    exit_code: int = EXIT_FAILED
    time: float = 0.0
    """Seconds since 1970."""
    step: int | None = None
    """Optimizer steps attempted in this attempt; None if it never came to the first."""
    killed: bool = False
    """Whether SIGKILL ended it."""
    consequence: bool = False
    """Whether it looks like what a rank suffers when another one has gone: a broken connection, or SIGTERM."""

    @classmethod
    def of(cls, error: BaseException, rank: int, host: str, log: Path, step: int | None) -> Failure:
        """From the exception that ended a worker."""
        expected = isinstance(error, (RequestError, TrainingError))
        return cls(
            rank=rank,
            host=host,
            log=str(log),
            message=str(error) if expected else "".join(traceback.format_exception_only(error)).strip(),
            traceback="" if expected else "".join(traceback.format_exception(error)),
            exit_code=EXIT_REQUEST if isinstance(error, RequestError) else EXIT_FAILED,
            time=time.time(),
            step=step,
            consequence=_is_broken_connection(error),
        )

    def write(self, path: Path) -> None:
        """Leave it for the launching process."""
        write_json(path, asdict(self))

    @property
    def reason(self) -> str:
        """Rank and message in one line."""
        line = " ".join(self.message.split())
        short = line if len(line) <= _REASON_LENGTH else f"{line[: _REASON_LENGTH - 1]}…"
        return f"rank {self.rank}: {short}"

    def __str__(self) -> str:
        if self.exit_code == EXIT_REQUEST:  # put like one that is found before any worker starts
            return f"launch: {self.message.strip()}"
        where = f"rank {self.rank} on {self.host} failed; its log: {self.log}"
        return f"{(self.traceback or self.message).strip()}\n{where}"


_BROKEN_CONNECTION = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "connectfullmesh failed",  # gloo, while the group is formed
    "broken pipe",
    "socket closed",
)


def _is_broken_connection(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    text = str(error).lower()
    return bool(names & {"DistBackendError", "DistNetworkError"}) or (
        isinstance(error, RuntimeError) and any(words in text for words in _BROKEN_CONNECTION)
    )


def first_failure(run: RunDirectory, attempt: int, silent: Sequence[Failure] = ()) -> Failure | None:
    """The failure that caused the others.

    A rank writes its failure before its connections close, so what its peers suffer from that is
    written later (on one host; the clocks of several may differ), and mostly says so itself.

    Args:
        run: the run's directory.
        attempt: from 0.
        silent: failures of ranks that could not write theirs, because they were killed or crashed.
    """
    written = []
    for path in run.attempt_logs(attempt).glob("rank-*.failure.json"):
        try:
            written.append(Failure(**read_json(path)))
        except (OSError, ValueError, TypeError):
            continue  # the rank was killed while it wrote
    said = {failure.rank for failure in written}
    written.sort(key=lambda failure: failure.time)
    in_order = [*written, *(failure for failure in silent if failure.rank not in said)]
    return min(in_order, key=lambda failure: failure.consequence, default=None)

"""One launch at a time writes into a run: locks of the kernel, which end with the process that holds them.

The launching process holds ``launcher.lock`` alone, for its life. Each worker shares ``workers.lock``, for its
life: a launcher that was killed may leave workers behind for a moment, and the next launch waits for them.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.errors import RunError
from launcher.rundir.layout import RunDirectory

__all__ = ["Holder", "RunLock", "hold_as_worker", "is_launched"]

_WORKERS_PATIENCE_SECONDS = 20.0
_LOOK_SECONDS = 0.3
"""Whoever only looks whether a lock is held, holds it for a moment: no reason to refuse a launch."""
_POLL_SECONDS = 0.05
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system says that has none."""


@dataclass(frozen=True)
class Holder:
    """Who holds, or held last, a run's lock."""

    host: str
    pid: int
    attempt: int | None
    started: float
    """Of the attempt, or of the launch before its first: seconds since 1970."""

    @classmethod
    def read(cls, run: RunDirectory) -> Holder | None:
        """None if nobody has left a name."""
        try:
            return cls(**json.loads(run.launcher_lock.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        attempt = f"attempt {self.attempt}, " if self.attempt is not None else ""
        return f"process {self.pid} on {self.host} ({attempt}since {since})"


class RunLock:
    """What makes this process the only one that launches a run."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.works = True
        """False where the file system has no locks: nothing then keeps a second launch away."""
        self.previous: Holder | None = None
        """Who held it last."""

    @classmethod
    def take(cls, run: RunDirectory, patience_seconds: float = 0.0, workers_may_be_there: bool = False) -> RunLock:
        """Become the one that launches ``run``, once no worker of an earlier launch is left.

        Args:
            run: its directory exists.
            patience_seconds: how long to wait for a launcher that is about to end.
            workers_may_be_there: whether those that share the workers' lock are this attempt's own.

        Raises:
            RunError: another process launches it; its host and id are named.
        """
        lock = cls(_open(run.launcher_lock))
        try:
            if not lock._acquire(lock._descriptor, patience_seconds):
                raise RunError(
                    f"The run {run.path} is being written by {Holder.read(run) or 'another process'}. "
                    "Stop it first, or start a run of its own."
                )
            if not workers_may_be_there:
                lock._wait_for_workers(run)
            lock.previous = Holder.read(run)
            lock.sign(None)
        except BaseException:
            lock.release()
            raise
        return lock

    def sign(self, attempt: int | None) -> None:
        """Leave this process's name, for whoever asks who holds the lock."""
        holder = Holder(socket.gethostname(), os.getpid(), attempt, time.time())
        content = json.dumps(asdict(holder)).encode() + b"\n"
        os.pwrite(self._descriptor, content, 0)
        os.ftruncate(self._descriptor, len(content))

    def release(self) -> None:
        """Let go; the files stay, or two processes could hold two files of one name."""
        os.close(self._descriptor)

    def _wait_for_workers(self, run: RunDirectory) -> None:
        descriptor = _open(run.workers_lock)
        try:
            if self.works and not self._acquire(descriptor, _WORKERS_PATIENCE_SECONDS):
                raise RunError(
                    f"The run {run.path} still has workers of an earlier attempt, started by "
                    f"{Holder.read(run) or 'another process'}, which has ended: end them first."
                )
        finally:
            os.close(descriptor)

    def _acquire(self, descriptor: int, patience_seconds: float) -> bool:
        deadline = time.monotonic() + max(patience_seconds, _LOOK_SECONDS)
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(_POLL_SECONDS)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                self.works = False
                return True


def is_launched(run: RunDirectory) -> bool:
    """Whether a process is there that launches the run; False too where the file system has no locks."""
    try:
        descriptor = os.open(run.launcher_lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


_held: list[Any] = []
"""Descriptors that a worker keeps open until it ends."""


def hold_as_worker(run: RunDirectory) -> bool:
    """Share the workers' lock until this process, and whatever it forks, has ended.

    Returns:
        False if another launch has taken the run over: this process is a leftover, and must end.
    """
    descriptor = _open(run.workers_lock)
    _held.append(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

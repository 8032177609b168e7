"""Writing checkpoints while training goes on, and making them valid when all ranks have written.

A rank's part is written by a thread of its own that talks to nobody. That it is done, or has failed, travels as a
vote in the collective that each training step makes anyway; every rank reads the same sums, and so all know after
the same step that rank 0 may commit, and later that it has. Nothing else is agreed on, except what went wrong.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.checkpoint.files import WriteFailedError
from launcher.checkpoint.manifest import DamagedError
from launcher.checkpoint.snapshot import Snapshot, local_part
from launcher.checkpoint.staging import Stage, WritePlan, make_plan
from launcher.checkpoint.store import CheckpointStore
from launcher.checkpoint.writing import collect_parts, write_part

__all__ = ["Failed", "Problem", "Saved", "Saver"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """Why one rank could not do its part."""

    rank: int
    file: str
    reason: str

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.file}: {self.reason}"


@dataclass(frozen=True)
class Saved:
    """A checkpoint has been committed."""

    step: int
    path: Path
    seconds: float
    """From the decision to save to the commit."""
    stall_seconds: float
    """Of these, how long training stood still."""
    num_bytes: int
    """On the disk, over all ranks; 0 on ranks but the first."""


@dataclass(frozen=True)
class Failed:
    """A checkpoint could not be written; the former ones are untouched."""

    step: int
    problems: tuple[Problem, ...]
    """The same on every rank."""


@dataclass
class _Pending:
    """A checkpoint that is not one yet."""

    snapshot: Snapshot
    started: float
    work: Future[Any]
    committing: bool = False
    """False: this rank's part is being written. True: all are written, and rank 0 commits."""
    since: int = 0
    """Votes of steps up to this one were not about this."""
    stalled: float = 0.0


@dataclass
class Saver:
    """One rank's part in saving.

    Args:
        store: the run's checkpoints.
        rank, world_size: of the default process group; 1 needs none.
        device: where the state lives.
        asynchronous: copy first and write while training goes on.
        prune: called on rank 0 after each commit, in the writing thread.
    """

    store: CheckpointStore
    rank: int
    world_size: int
    device: torch.device
    asynchronous: bool = True
    prune: Callable[[], object] = lambda: None
    _plan: WritePlan | None = field(default=None, init=False)
    _pending: _Pending | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tminus-checkpoint")
        self._shared, self._private = Stage(self.device), Stage(self.device)

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is on its way; the same on every rank."""
        return self._pending is not None

    @property
    def votes(self) -> tuple[bool, bool]:
        """Whether this rank is done with what it does now, and whether it has failed; for the step's collective."""
        pending = self._pending
        if pending is None or not pending.work.done() or (pending.committing and self.rank > 0):
            return False, False
        failed = pending.work.exception() is not None
        return not failed, failed

    @property
    def staged_bytes(self) -> int:
        """Host memory that copies take."""
        return self._shared.num_bytes + self._private.num_bytes

    def prepare(self, snapshot: Snapshot) -> None:
        """Agree on who writes what and reserve the memory, so that the first save need not; collective."""
        self._plan = make_plan(snapshot.tensors, self.rank, self.world_size)
        if self.asynchronous:
            self._shared.prepare(self._mine(snapshot))
            self._private.copy_tree(snapshot.private)

    def begin(self, take: Callable[[], Snapshot]) -> None:
        """Start to save what ``take`` returns; collective. Returns when the state may change again."""
        assert self._pending is None, "one at a time"
        started = time.perf_counter()
        snapshot = take()
        step = snapshot.manifest.step
        refused: Future[Any] = Future()
        if self.rank == 0:
            try:
                self.store.begin(step)
            except OSError as error:
                refused.set_exception(WriteFailedError(Path(error.filename or self.store.directory), str(error)))
        # Also tells all that the folder is there.
        (unfit,) = self._sum(float(self._plan is None or not self._plan.fits(snapshot.tensors)))
        if unfit:
            self._plan = make_plan(snapshot.tensors, self.rank, self.world_size)
        assert self._plan is not None
        tensors, private = self._mine(snapshot), snapshot.private
        if self.asynchronous:
            tensors, private = self._shared.copy(tensors), self._private.copy_tree(private)
        if refused.done():
            work = refused
        else:
            folder, plan = self.store.partial(step), self._plan.items
            work = self._thread.submit(write_part, folder, self.rank, plan, tensors, private)
        stalled = time.perf_counter() - started
        self._pending = _Pending(snapshot, started, work, since=step, stalled=stalled)

    def observe(self, step: int, done: int, failed: int, steps_started: int) -> Saved | Failed | None:
        """Take the sums of a step's votes into account; a collective only if something failed.

        Args:
            step: whose votes they are.
            done, failed: how many ranks have voted so.
            steps_started: steps whose votes have been cast by now.

        Returns:
            What became of the checkpoint, once that is known; the same on every rank.
        """
        if self._pending is None or step <= self._pending.since:
            return None
        return self._advance(done, failed, steps_started)

    def settle(self) -> Saved | Failed | None:
        """Wait for the checkpoint that is on its way; collective."""
        result: Saved | Failed | None = None
        while (pending := self._pending) is not None:
            started = time.perf_counter()
            pending.work.exception()  # waits
            done, failed = self._sum(*map(float, self.votes))
            pending.stalled += time.perf_counter() - started
            result = self._advance(int(done), int(failed), pending.since)
        return result

    def _advance(self, done: int, failed: int, steps_started: int) -> Saved | Failed | None:
        pending = self._pending
        assert pending is not None
        if done + failed < (1 if pending.committing else self.world_size):
            return None
        step = pending.snapshot.manifest.step
        if failed:
            self._pending = None
            problems = self._gather_problems(pending)
            if self.rank == 0:
                self.store.discard(step)
            return Failed(step, problems)
        if not pending.committing:
            pending.committing, pending.since = True, steps_started
            pending.work = self._thread.submit(self._commit, pending.snapshot) if self.rank == 0 else _nothing()
            return None
        self._pending = None
        num_bytes, ended = pending.work.result() or (0, pending.started)
        return Saved(step, self.store.path(step), ended - pending.started, pending.stalled, num_bytes)

    def _commit(self, snapshot: Snapshot) -> tuple[int, float]:
        """On rank 0: make it a checkpoint; returns its size and when that was done."""
        assert self._plan is not None
        assert self._plan.metadata is not None
        folder = self.store.partial(snapshot.manifest.step)
        try:
            records = collect_parts(folder, self.world_size, self._plan.metadata)
            checkpoint = self.store.commit(snapshot.manifest, records)
        except OSError as error:
            raise WriteFailedError(Path(error.filename or folder), error.strerror or str(error)) from error
        except DamagedError as damage:
            raise WriteFailedError(folder, str(damage)) from damage
        ended = time.perf_counter()
        try:
            self.prune()
        except OSError as error:
            _log.warning("Old checkpoints could not be removed: %s", error)
        return checkpoint.manifest.total_bytes, ended

    def _mine(self, snapshot: Snapshot) -> dict[str, torch.Tensor]:
        assert self._plan is not None
        return {name: local_part(snapshot.tensors[name]) for name in self._plan.names}

    def _gather_problems(self, pending: _Pending) -> tuple[Problem, ...]:
        """What went wrong on which rank; collective."""
        error = pending.work.exception() if pending.work.done() else None
        mine: Problem | None = None
        if error is not None:
            known = isinstance(error, WriteFailedError)
            file = str(error.path) if known else str(self.store.partial(pending.snapshot.manifest.step))  # type: ignore[attr-defined]
            reason = error.reason if known else f"{type(error).__name__}: {error}"  # type: ignore[attr-defined]
            mine = Problem(self.rank, file, reason)
        found: list[Problem | None] = [mine]
        if self.world_size > 1:
            found = [None] * self.world_size
            dist.all_gather_object(found, mine)
        return tuple(problem for problem in found if problem is not None)

    def _sum(self, *values: float) -> list[float]:
        """Over all ranks; collective."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()


def _nothing() -> Future[Any]:
    done: Future[Any] = Future()
    done.set_result(None)
    return done

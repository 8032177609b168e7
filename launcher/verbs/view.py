"""A run seen from outside: what its directory says, whether anybody is at work on it, what SLURM says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.clusters.slurm import queue
from launcher.clusters.slurm.joblog import QUEUED, last_words
from launcher.clusters.slurm.postmortem import death_words
from launcher.clusters.slurm.queue import QueueError, SlurmJob
from launcher.rundir import RunDirectory, State, Status
from launcher.rundir.lock import Holder, is_launched
from launcher.rundir.records import tail_lines

__all__ = ["CANCELLED", "DEAD", "View", "configured", "last_line", "read_status", "views"]

_ACTIVE = (State.submitted, State.running, State.stopping)
DEAD, CANCELLED = "dead", "cancelled"
"""Conditions that no status.json names."""


@dataclass(frozen=True)
class View:
    """One run, now."""

    run: RunDirectory
    status: Status | None
    """None if the file cannot be read: the run has hardly begun."""
    launcher: Holder | None
    """The launching process; None if there is none."""
    job: SlurmJob | None
    """None if it is no job, or SLURM does not know it, or cannot be asked."""
    slurm_problem: str | None = None
    """Why SLURM could not be asked."""

    @property
    def name(self) -> str:
        """``name/id``."""
        return f"{self.run.path.parent.name}/{self.run.id}"

    @property
    def job_id(self) -> str | None:
        """Of SLURM."""
        return self.status.job_id if self.status is not None else None

    @property
    def is_alive(self) -> bool | None:
        """Whether somebody is at work on the run, or will be; None if that cannot be told."""
        if self.launcher is not None:
            return True
        if self.job is not None:
            return self.job.is_alive
        return None if self.job_id is not None and self.slurm_problem is not None else False

    @property
    def condition(self) -> str:
        """The state in the run's status; or ``cancelled``, by scancel, or ``dead``: whoever was to change it has ended
        without a word."""
        if self.status is None:
            return "starting" if self.is_alive else DEAD
        if self._comes_back:
            return State.submitted.value
        if self.status.state is State.resumable and self.job is not None and self.job.state == "COMPLETING":
            return State.stopping.value  # SLURM says only after that whether the job comes back
        if self.status.state in _ACTIVE and self.is_alive is False:
            return CANCELLED if self._is_cancelled else DEAD
        return self.status.state.value

    @property
    def explanation(self) -> str | None:
        """Why the run is in this condition."""
        if self._comes_back and self.status is not None:
            words = (last_words(self.run, self.job_id) if self.job_id is not None else None) or self.status.reason
            if self.status.state is State.submitted or (words and QUEUED in words):
                return words
            return "; ".join(filter(None, (words, QUEUED)))
        if self.condition == CANCELLED:
            return self._cancellation
        if self.condition != DEAD:
            reason = self.status.reason if self.status is not None else None
            cancelled = self.condition == State.resumable.value and self._is_cancelled
            return f"cancelled (scancel); {reason}" if cancelled else reason
        return self._death

    @property
    def _cancellation(self) -> str:
        """By scancel; none of the run's own processes was there to write it down, or had the time."""
        waited = self.status is not None and self.status.state is State.submitted
        return "in the queue (scancel)" if waited else "by scancel, at once: what was not saved is lost"

    @property
    def _death(self) -> str:
        """How a run has died, as far as that can be known."""
        if self.job_id is None:
            return "its launching process has ended without a word: killed, or its machine went down"
        said = f"SLURM says: {self.job}" if self.job is not None else f"SLURM knows no job {self.job_id} any more"
        if self.job is not None and (words := death_words(self.job)):
            return f"{words} ({said})"
        if last_word := last_words(self.run, self.job_id):
            return f"{last_word} ({said})"
        return f"its job has ended without a word: {said}; its tasks' own logs are in {self.run.submission}"

    @property
    def _comes_back(self) -> bool:
        """Whether SLURM has the job in its queue, to be started again: it has lost a node, say, and nobody is left to
        write that down."""
        at_work = (State.submitted, State.running, State.stopping, State.resumable)
        return self.job is not None and self.job.waits and self.status is not None and self.status.state in at_work

    @property
    def _is_cancelled(self) -> bool:
        return self.job is not None and self.job.state == "CANCELLED"


def views(runs: Sequence[RunDirectory]) -> list[View]:
    """What there is to see of each run; SLURM is asked once for all."""
    statuses = [read_status(run) for run in runs]
    ids = [status.job_id for status in statuses if status is not None and status.job_id is not None]
    jobs: dict[str, SlurmJob] = {}
    problem = None
    try:
        jobs = queue.ask(ids)
    except QueueError as error:
        problem = str(error)
    return [
        View(
            run,
            status,
            Holder.read(run) if is_launched(run) else None,
            jobs.get(status.job_id) if status is not None and status.job_id is not None else None,
            problem,
        )
        for run, status in zip(runs, statuses, strict=True)
    ]


def read_status(run: RunDirectory) -> Status | None:
    """What the run's status.json says; None if it says nothing."""
    try:
        return Status.read(run.status)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def last_line(path: Path, kind: str) -> dict[str, Any] | None:
    """The newest line of a kind near the end of a run's metrics; None if there is none."""
    for text in reversed(tail_lines(path)):
        try:
            line: dict[str, Any] = json.loads(text)
        except json.JSONDecodeError:  # cut by the tail's border, or by a crash
            continue
        if line.get("kind") == kind:
            return line
    return None


def configured(run: RunDirectory, attempt: int, group: str, field: str) -> Any:
    """A field of an attempt's configuration, which costs no import of what could check it; None if there is none."""
    try:
        return yaml.safe_load(run.config_of(attempt).read_text(encoding="utf-8"))[group][field]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None

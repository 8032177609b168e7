"""What is written down about a run's attempts from outside its workers: that one begins, and how each has ended."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from launcher.checkpoint import CheckpointStore
from launcher.errors import RunError
from launcher.rundir import RunDirectory, State, Status, append_json_line
from launcher.rundir.fence import Fence
from launcher.rundir.lock import Holder
from launcher.rundir.records import read_json_lines, recording

__all__ = [
    "begin_attempt",
    "end_run",
    "mark_stopping",
    "record_lost_attempts",
    "record_restart",
    "refusal",
    "reported_steps",
    "take_back",
]

_REFUSED = "refused"
"""How an attempt has ended that asked for something wrong, and has changed nothing."""
_LOST = "the launching process ended without a word: killed, or its machine went down"


def begin_attempt(run: RunDirectory, attempt: int, stopping: bool = False, hosts: Sequence[str] | None = None) -> None:
    """The run goes on in another attempt, if only to stop; those before are no longer the current one.

    Args:
        run: the run's directory.
        attempt: that begins.
        stopping: whether a stop has been asked for already.
        hosts: where it trains; None: where the run is launched.
    """
    with recording(run.path):
        Fence(run, attempt).put_up()
        state = State.stopping if stopping else State.running
        status = Status.read(run.status)
        known = status.hosts if hosts is None else tuple(hosts)
        status.now(state, attempt=attempt, hosts=known, reason=None).write(run.status)


def mark_stopping(run: RunDirectory) -> None:
    """A request to stop has come; rank 0 writes the same from its next step on.

    Called by signal handlers: that it cannot be written down must not end a launch that is about to save.
    """
    with suppress(OSError, RunError):
        status = Status.read(run.status)
        if status.state is State.running:
            status.now(State.stopping).write(run.status)


def end_run(
    run: RunDirectory,
    attempt: int,
    started: float,
    state: State,
    reason: str | None,
    goes_on: bool = False,
    refused: bool = False,
) -> None:
    """Write down how an attempt has ended, and with it the run.

    Args:
        run: the run's directory.
        attempt: that has ended.
        started: when it began, in seconds since 1970.
        state: that the run has come to.
        reason: in words.
        goes_on: whether another attempt follows at once.
        refused: whether it was a launch's first, and what was asked for was wrong: if it has made no step, the run
            is what it was before.

    Raises:
        RunError: it cannot be written down.
    """
    with recording(run.path):
        steps, hosts = reported_steps(run, attempt), _hosts(Status.read(run.status), attempt)
        if refused and not steps and take_back(run, attempt):
            ended = _REFUSED
        else:
            ended = state.value
            status = Status.read(run.status)
            now = State.running if goes_on else state
            status.now(now, attempt=attempt, step=max(steps, default=status.step), reason=reason).write(run.status)
        _record_end(run, attempt, (started, time.time()), ended, reason, hosts)


def refusal(run: RunDirectory) -> str | None:
    """Why the last attempt has changed nothing; None if it was not refused."""
    ends = list(_ends(run))
    return str(ends[-1].get("reason")) if ends and ends[-1].get("ended") == _REFUSED else None


def take_back(run: RunDirectory, attempt: int) -> bool:
    """Let the run be what the attempts before have made of it; ``attempt`` has made no step.

    Returns:
        False if there is no attempt before.
    """
    ends = [line for line in _ends(run) if line["attempt"] < attempt and line.get("ended") != _REFUSED]
    if not ends:
        return False
    run.config_from(attempt).unlink(missing_ok=True)
    before, status = ends[-1], Status.read(run.status)
    state = State(before["ended"]) if before.get("ended") in [state.value for state in State] else State.failed
    reason = before.get("reason")
    status.now(state, attempt=before["attempt"], step=before.get("last_step") or status.step, reason=reason).write(
        run.status
    )
    return True


def record_restart(run: RunDirectory, attempt: int, step: int, reason: str) -> None:
    """A line in the metrics: ``attempt`` begins because the one before has failed."""
    line = {"kind": "event", "attempt": attempt, "event": "restart", "step": step, "reason": reason}
    append_json_line(run.metrics, {**line, "time": time.time()})


def record_lost_attempts(
    run: RunDirectory, last_holder: Holder | None, before: int | None = None, reason: str | None = None
) -> int:
    """Write down the attempts whose launcher could not do so any more; call it under the run's lock.

    Args:
        run: the run's directory.
        last_holder: of that lock.
        before: the number of an attempt that is running already.
        reason: how it came, where that is known.

    Returns:
        The number of the last attempt that has begun, -1 if there is none.
    """
    recorded = {line["attempt"] for line in _ends(run)}
    begun = set(run.begun_attempts())
    status = Status.read(run.status) if run.status.exists() else None
    if status is not None and status.state in (State.running, State.stopping):
        begun.add(status.attempt)
    if before is not None:
        begun = {attempt for attempt in begun if attempt < before}
    for attempt in sorted(begun - recorded):
        times = _signs_of_life(run, attempt, status, last_holder)
        _record_end(run, attempt, times, "killed", reason or _LOST, _hosts(status, attempt))
    return max(recorded | begun, default=-1)


def _ends(run: RunDirectory) -> Iterator[dict[str, Any]]:
    """What is written down about attempts that have ended; a line that says nothing of one is left out."""
    for line in read_json_lines(run.attempts):
        if isinstance(line.get("attempt"), int):
            yield line


def _signs_of_life(
    run: RunDirectory, attempt: int, status: Status | None, last_holder: Holder | None
) -> tuple[float, float]:
    """When an attempt was first and last seen, in seconds since 1970."""
    logs = run.attempt_logs(attempt)
    seen = [path.stat().st_mtime for path in [logs, *logs.glob("*")] if path.exists()]
    lines = (line for line in read_json_lines(run.metrics) if line.get("attempt") == attempt)
    seen += [float(line["time"]) for line in lines if isinstance(line.get("time"), (int, float))]
    if status is not None and status.attempt == attempt:
        seen.append(status.updated)
    if last_holder is not None and last_holder.attempt == attempt:
        seen.append(last_holder.started)
    return min(seen), max(seen)


def _hosts(status: Status | None, attempt: int) -> Sequence[str]:
    """Where an attempt has trained; empty if nobody has written it down."""
    return status.hosts if status is not None and status.attempt == attempt else ()


def _record_end(
    run: RunDirectory, attempt: int, times: tuple[float, float], ended: str, reason: str | None, hosts: Sequence[str]
) -> None:
    steps = reported_steps(run, attempt)
    line = {
        "attempt": attempt,
        "start": times[0],
        "end": times[1],
        "hosts": list(hosts),
        "first_step": min(steps, default=None),
        "last_step": max(steps, default=None),
        "ended": ended,
        "reason": reason,
        "checkpoint": CheckpointStore(run.checkpoints).newest_step(),
    }
    append_json_line(run.attempts, line)


def reported_steps(run: RunDirectory, attempt: int) -> range:
    """The steps that an attempt has reported, first to last."""
    first = last = 0
    for line in read_json_lines(run.metrics):
        if line.get("attempt") == attempt and line.get("kind") == "train" and isinstance(line.get("step"), int):
            first, last = first or line["step"], line["step"]
    return range(first, last + 1) if first else range(0)

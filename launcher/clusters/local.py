"""A run on this machine: its attempts, one after the other, and its end."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.clusters.agent import StopForwarder, WorkersDiedError, run_workers
from launcher.clusters.attempts import begin_attempt, end_run, mark_stopping, record_restart, reported_steps
from launcher.clusters.deaths import silent_death, unknown_death
from launcher.clusters.entering import Entry, enter
from launcher.clusters.folders import shown
from launcher.clusters.progress import Restarts, newest_step, where
from launcher.config.schema import RunConfig
from launcher.config.sizes import world_size
from launcher.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_REQUEST, EXIT_RESUMABLE
from launcher.observe.terminal import say
from launcher.rundir import RunDirectory, State
from launcher.rundir.cancellation import Cancellation, is_cancelled_at_once
from launcher.rundir.failures import Failure, first_failure
from launcher.rundir.records import recording

__all__ = ["launch"]

_STOPPING = b"stopping after the current step; a second Ctrl-C ends the run at once, unsaved\n"
_ERASE_LINE = b"\r\x1b[K"
"""The live line of rank 0 is drawn again below."""


def launch(
    config: RunConfig, command: Sequence[str], forwarder: StopForwarder, job_may_change: bool = False
) -> tuple[int, RunDirectory]:
    """Train here, to the end: from nothing, or from where the run in ``config.run_dir`` has come to.

    Args:
        config: prepared and checked.
        command: the command line, for the record.
        forwarder: is listening; a request that has come already stops the run after its next step.
        job_may_change: of a run that exists, whether the job's arguments may be others than before.

    Returns:
        The exit code (0 finished, 1 failed, 2 wrong request found by a worker, 75 stopped), and the run's directory.
    """
    entry = enter(config, command, job_may_change)
    if entry.lock is None:
        say(f"the run {shown(entry.run.path)} has finished; train.max_steps=N makes it longer")
        return EXIT_FINISHED, entry.run
    _introduce(entry, config)
    forwarder.on_request = lambda: _acknowledge(entry.run)
    forwarder.ends_at_once = lambda: is_cancelled_at_once(entry.run)
    try:
        return _attempts(config, entry, forwarder), entry.run
    finally:
        forwarder.on_request = lambda: None  # there is nothing left to stop, however often it is asked for
        entry.lock.release()


def _acknowledge(run: RunDirectory) -> None:
    """A request to stop has come. Called in a signal's handler, which may have interrupted a write to stderr."""
    os.write(2, _ERASE_LINE * os.isatty(2) + _STOPPING)
    mark_stopping(run)


def _attempts(config: RunConfig, entry: Entry, forwarder: StopForwarder) -> int:
    """Attempts until one ends well, on request, or so that another would not help."""
    run, attempt = entry.run, entry.attempt
    restarts = Restarts(run, config)
    while True:
        assert entry.lock is not None
        with recording(run.path):
            entry.lock.sign(attempt)
        begin_attempt(run, attempt, stopping=forwarder.requested is not None)
        end = _attempt(config, run, attempt, forwarder)
        if end.failure is None:
            end_run(run, attempt, end.started, end.state, end.reason)
            if end.reason is not None:
                say(end.reason)
                _say_how_to_go_on(run, newest_step(run, config))
            return end.exit_code
        reason = end.failure.reason
        has_stepped = len(reported_steps(run, attempt)) > 0
        refusal = restarts.refusal(end.failure, has_stepped, forwarder.requested is not None)
        explained = f"{reason} ({refusal})" if refusal else reason
        wrong = end.exit_code == EXIT_REQUEST
        refused = wrong and attempt == entry.attempt
        end_run(run, attempt, end.started, State.failed, explained, goes_on=refusal is None, refused=refused)
        if refusal is not None:
            if refusal:
                say(refusal)
            if restarts.newest_step is not None and not wrong:
                _say_how_to_go_on(run, restarts.newest_step)
            say(str(end.failure), error=True)
            return end.exit_code
        attempt += 1
        record_restart(run, attempt, restarts.newest_step or 0, reason)
        say(str(end.failure), error=True)
        say(f"restarting: attempt {attempt}, {where(restarts.newest_step)} ({reason})")


@dataclass(frozen=True)
class _End:
    """How an attempt has ended."""

    started: float
    state: State
    exit_code: int
    reason: str | None = None
    failure: Failure | None = None


def _attempt(config: RunConfig, run: RunDirectory, attempt: int, forwarder: StopForwarder) -> _End:
    """Run the workers once; how it ended."""
    started = time.time()
    try:
        outcomes = run_workers(run.path, attempt, world_size(config), run.agent_log(attempt, node_rank=0), forwarder)
    except WorkersDiedError as died:
        silent = [silent_death(run, attempt, rank, code) for rank, code in died.deaths.items()]
        failure = first_failure(run, attempt, silent)
        cancellation = Cancellation.read(run)
        if cancellation is not None and not cancellation.save:
            return _End(started, State.failed, EXIT_FAILED, str(cancellation))
        if forwarder.requested and (failure is None or failure.killed):
            reason = f"stopped at once ({forwarder.requested}): the workers were killed before they could save"
            return _End(started, State.resumable, EXIT_RESUMABLE, reason)
        failure = failure or unknown_death(run, attempt)
        return _End(started, State.failed, failure.exit_code, failure=failure)
    outcome = outcomes[0]
    if outcome.finished:
        return _End(started, State.finished, EXIT_FINISHED)
    asked = Cancellation.read(run) or forwarder.requested or "a signal to a worker"
    reason = f"stopped on request ({asked}) after step {outcome.step}"
    return _End(started, State.resumable, EXIT_RESUMABLE, reason)


def _introduce(entry: Entry, config: RunConfig) -> None:
    """The first lines that a launch prints."""
    workers = f"{world_size(config)} worker(s) on {config.device.value}"
    attempt = f"attempt {entry.attempt}, " if entry.attempt else ""
    say(f"run: {shown(entry.run.path)}  ({attempt}{workers})")
    for change in entry.changes:
        say(f"changed: {change.key}: {change.before} → {change.after}")


def _say_how_to_go_on(run: RunDirectory, step: int | None) -> None:
    say(f"to go on, {where(step)}: launch resume {shlex.quote(shown(run.path))}")

"""A run on this machine: its directory, its attempts, its end."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.clusters.agent import StopForwarder, WorkersDiedError, run_workers
from launcher.clusters.attempts import create_run, end_run, reported_steps
from launcher.config.rules import world_size
from launcher.config.schema import RunConfig
from launcher.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_RESUMABLE
from launcher.observe.terminal import say
from launcher.rundir import RunDirectory, State
from launcher.rundir.failures import Failure, first_failure

__all__ = ["launch"]

_TAIL_LINES = 20


def launch(config: RunConfig, command: Sequence[str]) -> tuple[int, RunDirectory]:
    """Train here, from nothing to the end.

    Args:
        config: prepared and checked.
        command: the command line, for the record.

    Returns:
        The exit code (0 finished, 1 failed, 2 wrong request found by a worker, 75 stopped), and the run's directory.
    """
    forwarder = StopForwarder()
    attempt, furthest, restarts = 0, -1, 0
    with forwarder.listening():
        run = create_run(config, command)
        say(f"run: {_shown(run.path)}  ({world_size(config)} worker(s) on {config.device.value})")
        while True:
            code, failure = _attempt(config, run, attempt, forwarder)
            if failure is None or code != EXIT_FAILED or failure.step is None or forwarder.requested:
                return code, run
            restarts = 0 if failure.step > furthest else restarts + 1
            furthest = max(furthest, failure.step)
            if restarts >= config.cluster.max_restarts:
                return code, run
            attempt += 1
            say(f"restarting: attempt {attempt} (rank {failure.rank} failed: {failure.message})")


def _attempt(
    config: RunConfig, run: RunDirectory, attempt: int, forwarder: StopForwarder
) -> tuple[int, Failure | None]:
    """Run the workers once; write down and print how it ended."""
    started = time.time()
    try:
        outcomes = run_workers(run.path, attempt, world_size(config), run.agent_log(attempt, node_rank=0), forwarder)
    except WorkersDiedError as died:
        silent = [_silent_death(run, attempt, rank, code) for rank, code in died.deaths.items()]
        failure = first_failure(run, attempt, silent)
        if forwarder.requested and (failure is None or failure.killed):
            reason = f"{forwarder.requested}; the workers were killed before they could stop together"
            end_run(run, attempt, started, State.resumable, reason)
            say(f"stopped: {reason}", error=True)
            return EXIT_RESUMABLE, None
        failure = failure or _unknown_death(run, attempt)
        end_run(run, attempt, started, State.failed, f"rank {failure.rank}: {failure.message}")
        say(str(failure), error=True)
        return failure.exit_code, failure
    outcome = outcomes[0]
    if outcome.finished:
        end_run(run, attempt, started, State.finished, None)
        return EXIT_FINISHED, None
    reason = f"stopped on request ({forwarder.requested or 'a signal to a worker'}) after step {outcome.step}"
    end_run(run, attempt, started, State.resumable, reason)
    say(reason)
    return EXIT_RESUMABLE, None


def _silent_death(run: RunDirectory, attempt: int, rank: int, exit_code: int) -> Failure:
    """A worker that could not say why: killed, or crashed below Python."""
    log = run.rank_log(attempt, rank)
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:] if log.exists() else []
    message = f"The worker ended with exit code {exit_code} and no Python exception."
    if exit_code < 0:
        message = f"The worker was killed by {signal.Signals(-exit_code).name}."
    if exit_code == -signal.SIGKILL:
        message += " If nobody did so on purpose, the machine may have run out of memory."
    return Failure(
        rank=rank,
        host=socket.gethostname(),
        log=str(log),
        message=message,
        traceback="\n".join([*tail, message]),
        step=max(reported_steps(run, attempt), default=None),
        killed=exit_code == -signal.SIGKILL,
        consequence=exit_code == -signal.SIGTERM,  # the agent ends the others so; a worker that is up stops politely
    )


def _unknown_death(run: RunDirectory, attempt: int) -> Failure:
    """A worker that was gone before anybody had seen it."""
    log = run.agent_log(attempt, node_rank=0)
    message = "A worker ended before it could say anything; the agent's log tells which."
    return Failure(rank=0, host=socket.gethostname(), log=str(log), message=message)


def _shown(path: Path) -> str:
    """Relative to the current folder where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)

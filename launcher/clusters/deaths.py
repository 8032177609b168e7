"""Failures of workers that could not say why they have ended."""

from __future__ import annotations

import signal
import socket
import time

from launcher.clusters.attempts import reported_steps
from launcher.errors import EXIT_UNWRITABLE
from launcher.rundir import RunDirectory
from launcher.rundir.failures import Failure

__all__ = ["silent_death", "unknown_death"]

_TAIL_LINES = 20


def silent_death(run: RunDirectory, attempt: int, rank: int, exit_code: int) -> Failure:
    """A worker that could not say why: killed, or crashed below Python."""
    log = run.rank_log(attempt, rank)
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:] if log.exists() else []
    message = f"The worker ended with exit code {exit_code} and no Python exception."
    if exit_code == 0:
        message = "The worker ended with exit code 0 before the run was finished: something has called os._exit(0)."
    if exit_code == EXIT_UNWRITABLE:
        message = f"The worker failed, and could not write why: no space left for {run.path}, or it is not writable."
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
        time=time.time(),
        step=max(reported_steps(run, attempt), default=None),
        killed=exit_code == -signal.SIGKILL,
        consequence=exit_code == -signal.SIGTERM,  # the agent ends the others so; a worker that is up stops politely
    )


def unknown_death(run: RunDirectory, attempt: int) -> Failure:
    """A worker that was gone before anybody had seen it."""
    log = run.agent_log(attempt, node_rank=0)
    message = "A worker ended before it could say anything; the agent's log tells which."
    return Failure(rank=0, host=socket.gethostname(), log=str(log), message=message)

"""Workers that exist already: torchrun has started them, each runs this program, and they agree on one run.

Rank 0 composes the configuration and enters the run; the others learn of it through the store that torchrun
gave them all. What torchrun restarts goes on in the same directory.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Never

from launcher.clusters.attempts import begin_attempt, end_run, record_lost_attempts
from launcher.clusters.entering import enter
from launcher.clusters.folders import move_to
from launcher.clusters.resuming import compose_resumed
from launcher.environment import Ranks
from launcher.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_REQUEST, EXIT_RESUMABLE, ConfigurationError, RequestError
from launcher.orphans import die_with_parent
from launcher.rundir import RunDirectory, State
from launcher.rundir.access import restrict_umask
from launcher.rundir.lock import RunLock, hold_as_worker

__all__ = ["join"]

_VERDICT_KEY = "tminus/run"
_REFUSED_KEY = "tminus/refused"
"""Set once workers have found that what was asked for is wrong: the workers that torchrun restarts need not try."""
_COMPOSE_TIMEOUT = timedelta(minutes=10)
_LOCK_PATIENCE_SECONDS = 10.0


@dataclass(frozen=True)
class _Verdict:
    """What rank 0 tells the others."""

    exit_code: int = EXIT_FINISHED
    """If there is no run to work at."""
    run: str | None = None
    """The run's directory."""
    first_attempt: int = 0
    """Of this torchrun."""
    folder: str = ""
    """The folder to work in."""


_locks: list[RunLock] = []
"""Rank 0's, held until the process ends."""


def join(arguments: Sequence[str], resumes: bool) -> int:
    """Become one of torchrun's workers; returns the process's exit code.

    Args:
        arguments: the command line without the program's name.
        resumes: whether its first word says that it goes on with a run.
    """
    die_with_parent()
    restrict_umask()
    ranks = Ranks.from_environment(os.environ)
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    store = _store()
    if ranks.rank == 0 and restarts == 0:
        verdict = _Verdict(EXIT_REQUEST)
        try:
            verdict = _compose(arguments, ranks, resumes)
        except SystemExit as answered:
            verdict = _Verdict(EXIT_REQUEST if answered.code else EXIT_FINISHED)
            raise
        except RequestError as error:
            print(f"launch: {error}", file=sys.stderr, flush=True)
        finally:
            store.set(_VERDICT_KEY, json.dumps(asdict(verdict)))
    store.wait([_VERDICT_KEY], _COMPOSE_TIMEOUT)
    verdict = _Verdict(**json.loads(store.get(_VERDICT_KEY)))
    if verdict.run is None:
        return verdict.exit_code
    if Path(verdict.folder) != Path.cwd():
        move_to(Path(verdict.folder))
    if restarts > 0 and store.check([_REFUSED_KEY]):  # what was wrong stays wrong
        return EXIT_REQUEST
    run, attempt = RunDirectory(Path(verdict.run)), verdict.first_attempt + restarts
    if ranks.rank == 0 and restarts > 0:
        lock = RunLock.take(run, _LOCK_PATIENCE_SECONDS, workers_may_be_there=True)
        _locks.append(lock)
        record_lost_attempts(run, lock.previous, before=attempt)
    return _work(run, attempt, ranks, store, is_first=restarts == 0)


def _store() -> Any:
    """The store behind torchrun's rendezvous, without the prefix that changes with each restart."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # made in C++
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(iter(rendezvous("env://")))
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store


def _compose(arguments: Sequence[str], ranks: Ranks, resumes: bool) -> _Verdict:
    """Compose and enter the run."""
    from launcher.config.compose import compose
    from launcher.config.prepare import Machine, prepare
    from launcher.config.schema import RunConfig

    if {"-m", "--multirun"} & set(arguments):
        raise ConfigurationError("A sweep (-m) starts its own workers: use launch -m … without torchrun.")
    machine = Machine(ranks.world_size // ranks.local_world_size, ranks.local_world_size)
    verdicts = [_Verdict()]

    def command(config: RunConfig, warnings: list[str]) -> None:
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        entry = enter(config, ["torchrun", "-m", "launcher", *arguments], job_may_change=resumes)
        if entry.lock is None:
            print(f"the run {entry.run.path} has finished", flush=True)
            return
        _locks.append(entry.lock)
        print(f"run: {entry.run.path}  ({ranks.world_size} worker(s) on {config.device.value})", flush=True)
        verdicts.append(_Verdict(run=str(entry.run.path), first_attempt=entry.attempt, folder=str(Path.cwd())))

    composing = compose_resumed if resumes else compose
    words = arguments[1:] if resumes else arguments
    composing(words, lambda config: prepare(config, machine), command)
    return verdicts[-1]


def _work(run: RunDirectory, attempt: int, ranks: Ranks, store: Any, is_first: bool) -> Never:
    from launcher.observe.ranklog import Streams
    from launcher.rundir.failures import Failure, first_failure
    from launcher.worker import leave_now, live

    if not hold_as_worker(run):
        leave_now(EXIT_FAILED)
    started = time.time()
    if ranks.rank == 0:
        _locks[-1].sign(attempt)
        begin_attempt(run, attempt)

    def on_failure(failure: Failure, streams: Streams) -> None:
        first = first_failure(run, attempt) or failure
        if first.rank == failure.rank:
            print(failure, file=streams.errors, flush=True)
        if ranks.rank == 0:
            wrong = first.exit_code == EXIT_REQUEST
            reason = first.reason
            end_run(run, attempt, started, State.failed, reason, refused=wrong and is_first)
            if wrong:
                store.set(_REFUSED_KEY, reason)

    outcome = live(run, attempt, on_failure)
    reason = None if outcome.finished else f"stopped on request after step {outcome.step}"
    if ranks.rank == 0:
        end_run(run, attempt, started, State.finished if outcome.finished else State.resumable, reason)
    leave_now(EXIT_FINISHED if outcome.finished else EXIT_RESUMABLE)

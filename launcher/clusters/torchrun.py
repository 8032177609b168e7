"""Workers that exist already: torchrun has started them, each runs this program, and they agree on one run.

Rank 0 composes the configuration and makes the run directory; the others learn of it through the
store that torchrun gave them all. What torchrun restarts goes on in the same directory.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Never

from launcher.clusters.attempts import create_run, end_run
from launcher.environment import Ranks
from launcher.errors import EXIT_FINISHED, EXIT_REQUEST, EXIT_RESUMABLE, ConfigurationError, RequestError
from launcher.orphans import die_with_parent
from launcher.rundir import RunDirectory, State

__all__ = ["join"]

_VERDICT_KEY = "tminus/run"
_RUN, _NOTHING, _REFUSED = "run:", "nothing", "refused"
_COMPOSE_TIMEOUT = timedelta(minutes=10)


def join(arguments: Sequence[str]) -> int:
    """Become one of torchrun's workers; returns the process's exit code.

    Args:
        arguments: the command line without the program's name.
    """
    die_with_parent()
    ranks = Ranks.from_environment(os.environ)
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    store = _store()
    if ranks.rank == 0 and attempt == 0:
        verdict = _REFUSED
        try:
            verdict = _compose(arguments, ranks)
        except SystemExit as answered:
            verdict = _NOTHING if not answered.code else _REFUSED
            raise
        except RequestError as error:
            print(f"launch: {error}", file=sys.stderr, flush=True)
        finally:
            store.set(_VERDICT_KEY, verdict)
    store.wait([_VERDICT_KEY], _COMPOSE_TIMEOUT)
    verdict = store.get(_VERDICT_KEY).decode()
    if not verdict.startswith(_RUN):
        return EXIT_FINISHED if verdict == _NOTHING else EXIT_REQUEST
    return _work(RunDirectory(Path(verdict.removeprefix(_RUN))), attempt, ranks)


def _store() -> Any:
    """The store behind torchrun's rendezvous, without the prefix that changes with each restart."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # made in C++
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(iter(rendezvous("env://")))
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store


def _compose(arguments: Sequence[str], ranks: Ranks) -> str:
    """The verdict for all ranks: the new run's directory."""
    from launcher.config.compose import compose
    from launcher.config.prepare import Machine, prepare
    from launcher.config.schema import RunConfig

    if {"-m", "--multirun"} & set(arguments):
        raise ConfigurationError("A sweep (-m) starts its own workers: use launch -m … without torchrun.")
    machine = Machine(ranks.world_size // ranks.local_world_size, ranks.local_world_size)
    verdicts: list[str] = []

    def command(config: RunConfig, warnings: list[str]) -> None:
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        run = create_run(config, ["torchrun", "-m", "launcher", *arguments])
        print(f"run: {run.path}  ({ranks.world_size} worker(s) on {config.device.value})", flush=True)
        verdicts.append(f"{_RUN}{run.path}")

    compose(arguments, lambda config: prepare(config, machine), command)
    return verdicts[0] if verdicts else _NOTHING


def _work(run: RunDirectory, attempt: int, ranks: Ranks) -> Never:
    from launcher.observe.ranklog import Streams
    from launcher.rundir.failures import Failure, first_failure
    from launcher.worker import leave_now, live

    started = time.time()

    def on_failure(failure: Failure, streams: Streams) -> None:
        first = first_failure(run, attempt) or failure
        if first.rank == failure.rank:
            print(failure, file=streams.errors, flush=True)
        if ranks.rank == 0:
            end_run(run, attempt, started, State.failed, f"rank {first.rank}: {first.message}")

    outcome = live(run, attempt, on_failure)
    reason = None if outcome.finished else f"stopped on request after step {outcome.step}"
    if ranks.rank == 0:
        end_run(run, attempt, started, State.finished if outcome.finished else State.resumable, reason)
    leave_now(EXIT_FINISHED if outcome.finished else EXIT_RESUMABLE)

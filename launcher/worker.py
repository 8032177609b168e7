"""One rank's life: environment, process group, build (see ``building``), train, leave."""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Never

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # made in C++
from torch.distributed.rendezvous import rendezvous

from launcher.building import build_trainer
from launcher.checkpoint import CheckpointStore
from launcher.config.files import load_config
from launcher.config.schema import Device, RunConfig
from launcher.environment import Ranks, slurm_job_id, thread_limit
from launcher.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_UNWRITABLE
from launcher.observe import Reporter, RunFacts, build_reporter
from launcher.observe.ranklog import Streams, redirect_to_log
from launcher.observe.terminal import Terminal
from launcher.orphans import die_with_parent
from launcher.rundir import RunDirectory, State, Status, write_json
from launcher.rundir.access import restrict_umask
from launcher.rundir.failures import Failure
from launcher.rundir.fence import Fence
from launcher.rundir.lock import hold_as_worker
from launcher.training.digest import parameters_digest
from launcher.training.loop import Outcome, Trainer
from launcher.training.stop import StopRequest

__all__ = ["leave_now", "live", "main"]

_GROUP_TIMEOUT = timedelta(minutes=30)


def main(run_path: str, attempt: int, parent: int, mark: Connection) -> Outcome:
    """Be one of the workers that an elastic agent in the launching process starts.

    Args:
        run_path: the run's directory.
        attempt: from 0.
        parent: the id of the launching process, whose death ends this one.
        mark: a pipe into which this process's id goes, having come to the end: whatever ends a process early may do so
            with exit code 0.
    """
    restrict_umask()
    die_with_parent(parent)
    run = RunDirectory(Path(run_path))
    if not hold_as_worker(run):
        os._exit(EXIT_FAILED)  # nothing is written: the run belongs to another launch by now
    die_with_parent(parent)  # looked at once more, now that a next launch would wait for this process
    outcome = live(run, attempt)
    with suppress(OSError):
        mark.send_bytes(str(os.getpid()).encode())
    return outcome


def live(run: RunDirectory, attempt: int, on_failure: Callable[[Failure, Streams], None] | None = None) -> Outcome:
    """Be one worker of one attempt, from the environment that an elastic agent has set.

    A failure leaves a file for the launching process and ends this process at once: the peers'
    connections break, and they end too.

    Args:
        run: the run's directory.
        attempt: from 0.
        on_failure: called last, with the failure and the streams that this process was started with.
    """
    stop = StopRequest()
    stop.listen()
    ranks = Ranks.from_environment(os.environ)
    log = run.rank_log(attempt, ranks.rank)
    streams = redirect_to_log(log, ranks.rank)
    life = _Life(run, attempt, ranks, stop, streams.terminal)
    _alive.append(life)
    try:
        outcome = life.live()
        atexit.register(leave_now, EXIT_FINISHED)
        return outcome
    except BaseException as error:
        failure = Failure.of(error, ranks.rank, ranks.host, log, life.steps_attempted)
        code = failure.exit_code
        try:
            failure.write(run.rank_failure(attempt, ranks.rank))
            print(failure.traceback or failure.message, file=sys.stderr, flush=True)
            life.close()
        except OSError:  # the disk is full: the code alone can say so
            code = EXIT_UNWRITABLE
        if on_failure is not None:
            on_failure(failure, streams)
        os._exit(code)


_alive: list[_Life] = []
"""Keeps what a worker has built until the process ends. Freeing a process group's last user can deadlock: its
destructor joins gloo's threads while it holds the interpreter's lock, which they may need."""


def leave_now(code: int) -> Never:
    """End this process without freeing anything, for the same reason."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _Life:
    """What a worker builds, in order."""

    def __init__(
        self, run: RunDirectory, attempt: int, ranks: Ranks, stop: StopRequest, terminal: Terminal | None
    ) -> None:
        self._run = run
        self._attempt = attempt
        self._fence = Fence(run, attempt)
        self._ranks = ranks
        self._stop = stop
        self._terminal = terminal
        self._trainer: Trainer | None = None

    @property
    def steps_attempted(self) -> int | None:
        """None before the first step."""
        return self._trainer.learner.steps or None if self._trainer is not None else None

    def live(self) -> Outcome:
        """Train, report the result, and leave the process group together."""
        started = time.time()
        config = load_config(self._run.config_of(self._attempt))
        device = _enter_group(config, self._ranks, self._attempt)
        store = CheckpointStore(self._run.checkpoints, self._fence.holds)
        self._trainer = build_trainer(config, device, self._ranks, self._stop, self._report_to, store)
        outcome = self._trainer.train()
        digest = parameters_digest(self._trainer.learner.model.module)
        if self._ranks.rank == 0:
            self._conclude(outcome, digest, time.time() - started)
        self.close()
        if self._ranks.world_size > 1:
            dist.barrier()
        dist.destroy_process_group()
        return outcome

    def _report_to(self, facts: RunFacts) -> Reporter:
        hosts = tuple(dict.fromkeys(facts.hosts))
        job_id = slurm_job_id(os.environ) if facts.config.cluster.kind == "slurm" else None
        status = Status(State.running, attempt=self._attempt, hosts=hosts, job_id=job_id)
        return build_reporter(self._run, facts, self._terminal, status, lambda: self._stop.requested, self._fence.holds)

    def close(self) -> None:
        """Let go of the console, so that what follows stands below the live line."""
        if self._trainer is not None:
            self._trainer.reporter.close()

    def _conclude(self, outcome: Outcome, digest: str, seconds: float) -> None:
        assert self._trainer is not None
        if not outcome.finished:
            self._trainer.reporter.event("stop", step=outcome.step)
            return
        result = {
            "state": State.finished.value,
            "step": outcome.step,
            "loss": outcome.loss,
            "validation": outcome.validation,
            "parameters_digest": digest,
            "seconds": seconds,
        }
        if not self._fence.holds():
            return
        write_json(self._run.result, result)
        self._trainer.reporter.finish(result)


def _enter_group(config: RunConfig, ranks: Ranks, attempt: int) -> torch.device:
    """Set up this process for its device, and join the others."""
    threads = thread_limit(os.environ, ranks.local_world_size)
    if threads is not None:
        torch.set_num_threads(threads)
    if ranks.world_size == ranks.local_world_size and Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # host names need not resolve on one machine
    # torchrun keeps one store over its restarts, in which the addresses of dead workers would be found.
    store, _, _ = next(iter(rendezvous("env://", timeout=_GROUP_TIMEOUT)))
    cuda = config.device is Device.cuda
    device = torch.device("cuda", ranks.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=PrefixStore(f"tminus/attempt-{attempt}", store),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=_GROUP_TIMEOUT,
        device_id=device if cuda else None,
    )
    return device

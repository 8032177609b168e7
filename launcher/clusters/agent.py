"""One node's part of one attempt: torch's elastic agent, in this process, and what it leaves to us.

The agent starts the workers, tells them who they are, and notices when one ends. Left to us are
signals (its own handlers would kill the workers instead of letting them save), a quick end for
the others when one worker has died (it waits 30 seconds), and its log, which belongs in a file.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, cast

from launcher.clusters.reaper import Reaper
from launcher.clusters.signals import STOP_SIGNALS

if TYPE_CHECKING:
    from launcher.training.loop import Outcome

__all__ = ["Node", "StopForwarder", "WorkersDiedError", "run_workers"]

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Node:
    """This machine among several, which agree through a store that the first of them has opened."""

    rank: int
    """From 0; the workers' ranks follow it."""
    num_nodes: int
    address: str
    port: int
    """Where the store listens. On the first machine it is in this very process."""
    is_lost: Callable[[], bool] = lambda: False
    """Asked now and then: whether the attempt has failed elsewhere, and the workers here are to end."""


class WorkersDiedError(Exception):
    """At least one worker ended without a result.

    Args:
        deaths: how each worker ended that was not killed from here, by local rank: its exit code, or
            the negative number of the signal that killed it.
    """

    def __init__(self, deaths: dict[int, int]) -> None:
        super().__init__(f"exit codes by local rank: {deaths}")
        self.deaths = deaths


class StopForwarder:
    """Passes a request to stop on to the workers: SIGTERM, on which they stop together after a step.

    A second Ctrl-C kills them at once. Before there is a run to stop, the first is only noted (an exception out of the
    midst of an import may be lost, or leave half a module behind), and a second request ends the command.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        """The signal that asked first."""
        self.on_request: Callable[[], None] | None = None
        """Called at the first request, in the signal's handler; None as long as there is no run."""
        self.ends_at_once: Callable[[], bool] = lambda: False
        """Asked at each request, in the signal's handler: whether to kill the workers instead."""
        self._requests = self._interrupts = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the stop signals; the handlers there were come back afterwards."""
        # nohup and the like ask for a signal to be ignored, and are obeyed.
        heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._on_signal) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def request(self, reason: str) -> None:
        """Ask for a stop without a signal; the reaper passes it on."""
        if self.requested is None:
            self.requested = reason
            with suppress(OSError, ValueError):
                (self.on_request or (lambda: None))()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        is_first, self.requested = self.requested is None, self.requested or signal.Signals(number).name
        self._interrupts += number == signal.SIGINT
        self._requests += 1
        if self.on_request is None:
            if self._requests > 1:
                raise KeyboardInterrupt
            return
        _signal_workers(signal.SIGKILL if self._interrupts > 1 or self.ends_at_once() else signal.SIGTERM)
        if is_first:
            with suppress(OSError, ValueError):  # no record of a request is worth losing the request
                self.on_request()


def run_workers(
    run_path: Path,
    attempt: int,
    num_workers: int,
    agent_log: Path,
    forwarder: StopForwarder,
    node: Node | None = None,
) -> dict[int, Outcome]:
    """Start the workers of an attempt on this machine and wait for all of them.

    Args:
        run_path: the run's directory.
        attempt: from 0.
        num_workers: on this machine.
        agent_log: where the elastic agent's log goes.
        forwarder: passes requests to stop on to the workers.
        node: this machine among several; None if it is alone.

    Returns:
        The outcome of each rank on this machine.

    Raises:
        WorkersDiedError: a worker failed, or was killed; the others have ended too.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from launcher.worker import main

    finished, mark = multiprocessing.get_context("spawn").Pipe(duplex=False)
    # The agent never removes its own files.
    with finished, mark, tempfile.TemporaryDirectory(prefix="tminus-") as scratch:
        configuration = LaunchConfig(
            min_nodes=node.num_nodes if node is not None else 1,
            max_nodes=node.num_nodes if node is not None else 1,
            nproc_per_node=num_workers,
            logs_specs=DefaultLogsSpecs(log_dir=scratch),
            run_id=f"{run_path.name}-{attempt}",
            # c10d would order the nodes by their addresses, as text.
            rdzv_backend="c10d" if node is None else "static",
            # Port 0: the kernel picks a free one.
            rdzv_endpoint="localhost:0" if node is None else f"{node.address}:{node.port}",
            rdzv_configs={} if node is None else {"rank": node.rank},
            local_addr="localhost" if node is None else node.address,
            max_restarts=0,
            monitor_interval=_POLL_SECONDS,
            signals_to_handle="SIGQUIT",  # the others are ours, and this one is the reaper's
        )
        is_lost = node.is_lost if node is not None else lambda: False
        reaper = Reaper(num_workers, lambda: forwarder.requested is not None, is_lost, finished)
        try:
            with _log_to(agent_log), _held_back_in_children(), reaper.watching():
                outcomes = elastic_launch(configuration, main)(str(run_path), attempt, os.getpid(), mark)
        except (ChildFailedError, SignalException) as error:
            raise WorkersDiedError(reaper.deaths()) from error
    return cast("dict[int, Outcome]", outcomes)


def _signal_workers(number: signal.Signals) -> None:
    """To every process that this one has started through multiprocessing: the workers, and nothing else."""
    for worker in multiprocessing.active_children():
        if worker.pid is not None and worker.is_alive():
            os.kill(worker.pid, number)


@contextmanager
def _held_back_in_children() -> Iterator[None]:
    """Start workers with the stop signals blocked; each takes them once it can act on them.

    A Ctrl-C reaches every process of the terminal: a worker that still imports torch would die of it.
    Children inherit the mask of the thread that starts them, this one. The reaper's thread takes the
    signals for this process; Python runs their handlers here all the same.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    # multiprocessing's tracker must not die of a signal to all either; starting it unblocks INT and TERM here.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """The elastic agent's own log goes to a file: on the console it would bury what matters."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _Log(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    loggers = [logger for name, logger in logging.root.manager.loggerDict.items() if _is_elastic(name, logger)]
    before = [(logger, logger.handlers, logger.propagate) for logger in loggers if isinstance(logger, logging.Logger)]
    for logger, _, _ in before:
        logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
        with suppress(OSError):
            handler.close()


class _Log(logging.FileHandler):
    """A file that a full disk may cut short: the workers say what has become of the run."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name
        """Nothing."""


def _is_elastic(name: str, logger: object) -> bool:
    inside = ("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing")
    return isinstance(logger, logging.Logger) and name.startswith(inside)

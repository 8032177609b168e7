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
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from launcher.training.loop import Outcome

__all__ = ["Node", "StopForwarder", "WorkersDiedError", "run_workers"]

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
_GRACE_SECONDS = 3.0
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
        heard = [number for number in _STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
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
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from launcher.worker import main

    scratch = tempfile.TemporaryDirectory(prefix="tminus-")  # the agent's own files; it never removes them
    configuration = LaunchConfig(
        min_nodes=node.num_nodes if node is not None else 1,
        max_nodes=node.num_nodes if node is not None else 1,
        nproc_per_node=num_workers,
        logs_specs=DefaultLogsSpecs(log_dir=scratch.name),
        run_id=f"{run_path.name}-{attempt}",
        # c10d would order the nodes by their addresses, as text.
        rdzv_backend="c10d" if node is None else "static",
        # Port 0: the kernel picks a free one.
        rdzv_endpoint="localhost:0" if node is None else f"{node.address}:{node.port}",
        rdzv_configs={} if node is None else {"rank": node.rank},
        local_addr="localhost" if node is None else node.address,
        max_restarts=0,
        monitor_interval=_POLL_SECONDS,
        signals_to_handle="SIGQUIT",  # the others are ours
    )
    reaper = _Reaper(num_workers, forwarder, node.is_lost if node is not None else lambda: False)
    try:
        with scratch, _log_to(agent_log), _held_back_in_children(), reaper.watching():
            outcomes = elastic_launch(configuration, main)(str(run_path), attempt, os.getpid())
    except ChildFailedError as error:
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
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    # multiprocessing's tracker must not die of a signal to all either; starting it unblocks INT and TERM here.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Reaper:
    """Once a worker has died, gives the others a moment to end by themselves, then kills them."""

    def __init__(self, num_workers: int, forwarder: StopForwarder, is_lost: Callable[[], bool]) -> None:
        self._is_lost = is_lost
        self._num_workers = num_workers
        self._forwarder = forwarder
        self._all_know = False
        self._workers: dict[int, multiprocessing.process.BaseProcess] = {}
        self._killed: set[int] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch from a thread of its own, which also takes this process's signals, see above."""
        done = threading.Event()
        thread = threading.Thread(target=self._watch, args=(done,), name="reaper", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def deaths(self) -> dict[int, int]:
        """Once all have ended: the exit codes of those that failed and were not killed by this object."""
        in_order = sorted(self._workers)  # the agent starts them in the order of their ranks
        codes = {rank: self._workers[pid].exitcode for rank, pid in enumerate(in_order) if pid not in self._killed}
        return {rank: code for rank, code in codes.items() if code}

    def _watch(self, done: threading.Event) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
        while not done.wait(_POLL_SECONDS):
            if len(self._workers) < self._num_workers:
                self._workers |= {child.pid: child for child in multiprocessing.active_children() if child.pid}
            if self._forwarder.requested and not self._all_know and len(self._workers) == self._num_workers:
                self._all_know = True  # the request may have come before there was anybody to pass it on to
                self._signal(signal.SIGTERM)
            if self._is_lost() or any(_has_failed(worker) for worker in self._workers.values()):
                done.wait(_GRACE_SECONDS)
                self._killed |= self._signal(signal.SIGKILL)
                return

    def _signal(self, number: signal.Signals) -> set[int]:
        """To all workers that still run; returns their ids."""
        running = {pid for pid in self._workers if _is_running(pid)}
        for pid in running:
            os.kill(pid, number)
        return running


def _has_failed(worker: multiprocessing.process.BaseProcess) -> bool:
    """Whether a child has ended badly. It is left to the agent to collect."""
    try:
        assert worker.pid is not None
        ended = os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # the agent has collected it already, and multiprocessing kept how it ended
        return bool(worker.exitcode)
    return ended is not None and ended.si_status != 0


def _is_running(pid: int) -> bool:
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


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

"""A quick end for an attempt's other workers on this machine once one has died; torch's agent gives them 30 seconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from launcher.clusters.signals import STOP_SIGNALS

__all__ = ["Reaper"]

_GRACE_SECONDS = 3.0
_POLL_SECONDS = 0.1


class Reaper:
    """Once a worker has died, gives the others a moment to end by themselves, then kills them.

    Args:
        num_workers: on this machine.
        stop_requested: whether the workers are to stop; passed on to them once.
        is_lost: whether the attempt has failed elsewhere.
        finished: a pipe into which a worker that has come to its end has written its process id.
    """

    def __init__(
        self, num_workers: int, stop_requested: Callable[[], bool], is_lost: Callable[[], bool], finished: Connection
    ) -> None:
        self._num_workers = num_workers
        self._stop_requested = stop_requested
        self._is_lost = is_lost
        self._finished = finished
        self._at_their_end: set[int] = set()
        self._all_know = False
        self._workers: dict[int, BaseProcess] = {}
        self._killed: set[int] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch from a thread of its own, which also takes this process's signals: the main thread, which starts the
        workers, has them blocked."""
        done = threading.Event()
        thread = threading.Thread(target=self._watch, args=(done,), name="reaper", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def deaths(self) -> dict[int, int]:
        """Once all have ended: the exit codes of those that failed and were not killed by this object, by local rank;
        0 of one that has ended before it was at its end."""
        in_order = sorted(self._workers)  # the agent starts them in the order of their ranks
        codes = {rank: self._workers[pid].exitcode for rank, pid in enumerate(in_order) if self._has_died(pid)}
        return {rank: code for rank, code in codes.items() if code is not None}

    def _has_died(self, pid: int) -> bool:
        return pid not in self._killed and self._has_failed(self._workers[pid])

    def _watch(self, done: threading.Event) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        while not done.wait(_POLL_SECONDS):
            if len(self._workers) < self._num_workers:
                self._workers |= {child.pid: child for child in multiprocessing.active_children() if child.pid}
            if self._stop_requested() and not self._all_know and len(self._workers) == self._num_workers:
                self._all_know = True  # the request may have come before there was anybody to pass it on to
                self._signal(signal.SIGTERM)
            if self._is_lost() or any(self._has_failed(worker) for worker in self._workers.values()):
                if not done.wait(_GRACE_SECONDS):
                    self._end_all(done)
                return

    def _end_all(self, done: threading.Event) -> None:
        self._killed |= self._signal(signal.SIGKILL)
        if not self._killed and not done.wait(_GRACE_SECONDS):
            # All have ended with 0, and the agent waits for what they were to return: it takes this one as an end.
            os.kill(os.getpid(), signal.SIGQUIT)

    def _signal(self, number: signal.Signals) -> set[int]:
        """To all workers that still run; returns their ids."""
        running = {pid for pid, worker in self._workers.items() if _exit_code(worker) is None}
        for pid in running:
            os.kill(pid, number)
        return running

    def _has_failed(self, worker: BaseProcess) -> bool:
        """Whether a worker has ended badly: with an error, or early. It is left to the agent to collect."""
        code = _exit_code(worker)
        return code is not None and (code != 0 or not self._has_finished(worker))

    def _has_finished(self, worker: BaseProcess) -> bool:
        """Whether a worker that has ended with 0 was at its end; it has said so before."""
        while self._finished.poll():
            self._at_their_end.add(int(self._finished.recv_bytes()))
        return worker.pid in self._at_their_end


def _exit_code(worker: BaseProcess) -> int | None:
    """Of a child; negative for a signal, None while it runs."""
    try:
        assert worker.pid is not None
        ended = os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # the agent has collected it already, and multiprocessing kept how it ended
        return worker.exitcode
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

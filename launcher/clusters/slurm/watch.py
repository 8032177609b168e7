"""What each node keeps an eye on while its workers train, in threads of their own."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime

from launcher.clusters.agent import StopForwarder
from launcher.clusters.slurm import queue
from launcher.clusters.slurm.channel import Channel
from launcher.clusters.slurm.postmortem import is_shell_killed
from launcher.clusters.slurm.queue import QueueError
from launcher.environment import JobPlace
from launcher.errors import EXIT_RESUMABLE
from launcher.rundir import RunDirectory
from launcher.rundir.fence import Fence
from launcher.rundir.records import read_json_lines

__all__ = ["Deadline", "FailureWatch", "watch_fence", "watch_shell"]

_FENCE_SECONDS = 1.0
_CHANNEL_SECONDS = 0.5
_LIMIT_SECONDS = 60.0
_SHELL_SECONDS = 0.5
_SHELL_LOOKS = 10
_ASKING_NODES = 4
"""A controller has better to do than to answer all nodes of a large job."""
_CAUTION = 2.0
"""The lead is this many times the longest that a step and a save have taken together."""


def watch_fence(fence: Fence) -> threading.Event:
    """End this process and its workers, in whatever they are, once a later attempt has begun.

    Returns:
        Set it, and the watch is over.
    """
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_FENCE_SECONDS):
            if not fence.holds():
                for worker in multiprocessing.active_children():
                    worker.kill()
                print(f"attempt {fence.attempt} is over: a later one has begun", file=sys.stderr, flush=True)
                os._exit(EXIT_RESUMABLE)

    threading.Thread(target=watch, name="fence", daemon=True).start()
    return done


def watch_shell(place: JobPlace, forwarder: StopForwarder) -> None:
    """Bring the job back if the shell of its batch file is killed: SLURM takes that for its end, and requeues nothing.

    It sends SIGTERM to all tasks then, which stop and save, and SIGKILL after KillWait: the requeue does not wait for
    the save. Any node can ask for it, and the first ones do, one after the other, as one may have been killed too.
    """
    if place.node >= _ASKING_NODES:
        return

    def watch() -> None:
        while forwarder.requested is None:
            time.sleep(_SHELL_SECONDS)
        time.sleep(_SHELL_SECONDS * place.node)
        for _ in range(_SHELL_LOOKS):
            with suppress(QueueError):
                job = queue.show(place.job_id)
                if job.get("Restarts") != str(place.turn):
                    return
                if is_shell_killed(job):
                    forwarder.requested = f"{forwarder.requested}: the shell of the job's batch file was killed"
                    queue.requeue(place.job_id)
                    return
            time.sleep(_SHELL_SECONDS)

    threading.Thread(target=watch, name="shell", daemon=True).start()


class FailureWatch:
    """Whether the attempt has failed on another node, or the first node is gone.

    Args:
        channel: to the first node.
        attempt: the one that is made.
    """

    def __init__(self, channel: Channel, attempt: int) -> None:
        self._channel = channel
        self._attempt = attempt
        self._done = threading.Event()
        self._failed = threading.Event()
        threading.Thread(target=self._watch, name="failure", daemon=True).start()

    def has_failed(self) -> bool:
        """So far; costs nothing."""
        return self._failed.is_set()

    def end(self) -> None:
        """Stop looking."""
        self._done.set()

    def _watch(self) -> None:
        try:
            channel = self._channel.another()
            while not self._done.wait(_CHANNEL_SECONDS):
                if channel.has_failed(self._attempt):
                    self._failed.set()
                    return
        except Exception:  # the store's server is the first node's process: it has ended
            self._failed.set()


class Deadline:
    """Asks for a stop before the job's time is over: early enough for a step and a save, as long as they have taken.

    Args:
        job_id: whose limit counts.
        lead_seconds: at least.
        run: where the times are read.
        request: asks for the stop.
    """

    def __init__(self, job_id: str, lead_seconds: float, run: RunDirectory, request: Callable[[str], None]) -> None:
        self._job_id = job_id
        self._lead_seconds = lead_seconds
        self._run = run
        self._request = request
        threading.Thread(target=self._watch, name="deadline", daemon=True).start()

    def _watch(self) -> None:
        asked, end, lead = 0.0, None, self._lead_seconds
        while True:
            if time.monotonic() - asked > _LIMIT_SECONDS or not asked:
                asked = time.monotonic()
                end = _end_of(self._job_id)
                lead = max(self._lead_seconds, _CAUTION * _longest_step_and_save(self._run))
            if end is not None and time.time() >= end - lead:
                self._request("the time limit")
                return
            time.sleep(1.0)


def _end_of(job_id: str) -> float | None:
    """When SLURM will end the job, in seconds since 1970; None if that is not known, or never."""
    try:
        return datetime.fromisoformat(queue.show(job_id).get("EndTime", "")).timestamp()
    except (QueueError, ValueError):
        return None


def _longest_step_and_save(run: RunDirectory) -> float:
    """In seconds, as measured so far."""
    step = save = 0.0
    for line in read_json_lines(run.metrics):
        if line.get("kind") == "train":
            step = max(step, float(line["step_seconds"]))
        elif line.get("event") == "checkpoint":
            save = max(save, float(line["seconds"]))
    return step + save

"""One launch at a time, by locks that end with their holder: real processes, real locks."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.errors import RunError
from launcher.rundir import RunDirectory, lock
from launcher.rundir.lock import Holder, RunLock, hold_as_worker

HOLD = """
import sys, time
from pathlib import Path
from launcher.rundir import RunDirectory
from launcher.rundir.lock import RunLock, hold_as_worker
held = {function}
print("held", flush=True)
time.sleep(60)
"""
Hold = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


@pytest.fixture
def hold(run: RunDirectory) -> Iterator[Hold]:
    """Starts a process that holds a lock of the run, and ends it."""
    processes: list[subprocess.Popen[str]] = []

    def start(function: str) -> subprocess.Popen[str]:
        code = HOLD.format(function=f"{function}(RunDirectory(Path({str(run.path)!r})))")
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_second_launch_is_refused_and_told_by_whom(run: RunDirectory, hold: Hold) -> None:
    process = hold("RunLock.take")
    with pytest.raises(RunError, match=f"is being written by process {process.pid} on {socket.gethostname()}"):
        RunLock.take(run)


def test_a_lock_ends_with_a_holder_that_is_killed(run: RunDirectory, hold: Hold) -> None:
    process = hold("RunLock.take")
    process.send_signal(signal.SIGKILL)
    process.wait()
    taken = RunLock.take(run)
    assert taken.previous is not None
    assert taken.previous.pid == process.pid
    holder = Holder.read(run)
    assert holder is not None
    assert holder.pid == os.getpid()
    taken.release()


def test_a_launch_waits_until_the_last_worker_has_gone(run: RunDirectory, hold: Hold) -> None:
    workers = [hold("hold_as_worker") for _ in range(2)]
    workers[0].kill()
    started = time.monotonic()
    killer = threading.Timer(0.5, workers[1].kill)
    killer.start()
    RunLock.take(run).release()
    assert time.monotonic() - started >= 0.5
    killer.join()


def test_a_launch_gives_up_on_workers_that_stay(run: RunDirectory, hold: Hold, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_WORKERS_PATIENCE_SECONDS", 0.2)
    hold("hold_as_worker")
    with pytest.raises(RunError, match="still has workers of an earlier attempt"):
        RunLock.take(run)
    RunLock.take(run, workers_may_be_there=True).release()


def test_a_worker_that_comes_while_another_launch_takes_over_is_told(run: RunDirectory) -> None:
    descriptor = lock._open(run.workers_lock)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert not hold_as_worker(run)
    os.close(descriptor)
    assert hold_as_worker(run)
    while lock._held:
        os.close(lock._held.pop())

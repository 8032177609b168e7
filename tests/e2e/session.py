"""A command in a process session of its own, so that a test can see what it leaves behind.

torchrun gives its workers sessions of their own; so each command's environment carries a mark too,
which every process that it starts inherits.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["LAUNCH", "Command", "survivors"]

LAUNCH = (sys.executable, "-m", "launcher")
TIMEOUT_SECONDS = 90.0
_MARK = "TMINUS_TEST_COMMAND"
_marks: dict[int, bytes] = {}
"""The environment's entry of each command, by its process id."""


class Command:
    """A running command; ``wait`` gives its exit code and leaves its output in ``output`` and ``errors``."""

    def __init__(self, arguments: Sequence[str], folder: Path, command: Sequence[str] = LAUNCH) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
        mark = secrets.token_hex(8)
        self._process = subprocess.Popen(
            [*command, *arguments],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**environment, _MARK: mark},
        )
        _marks[self.pid] = f"{_MARK}={mark}".encode()
        self.folder = folder
        self.output = self.errors = ""

    @property
    def pid(self) -> int:
        """Of the command; also the id of its session and process group."""
        return self._process.pid

    def wait(self) -> int:
        """Until it has ended."""
        try:
            self.output, self.errors = self._process.communicate(timeout=TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self.end()
            raise
        return self._process.returncode

    def send(self, number: signal.Signals) -> None:
        """A signal to the command alone."""
        os.kill(self.pid, number)

    def send_all(self, number: signal.Signals) -> None:
        """A signal to every process of its group, as a terminal sends Ctrl-C."""
        os.killpg(self.pid, number)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition; fail if the command ends first."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not condition():
            assert self._process.poll() is None, f"ended early: {self._process.communicate()}"
            assert time.monotonic() < deadline, "timed out"
            time.sleep(0.02)

    def run_directory(self, name: str = "own") -> Path:
        """The only run of a name below ``runs``."""
        (run,) = (self.folder / "runs" / name).iterdir()
        return run

    def steps(self, name: str = "own") -> int:
        """Lines of metrics.jsonl so far."""
        try:
            return len((self.run_directory(name) / "metrics.jsonl").read_text().splitlines())
        except (OSError, ValueError):
            return 0

    def end(self) -> None:
        """Kill whatever is left of the session."""
        for pid in survivors(self.pid):
            os.kill(pid, signal.SIGKILL)


def survivors(session: int) -> list[int]:
    """The living processes of a command's session, and what they have started in other sessions."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, _, _, its_session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            marked = _marks.get(session) in (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or is another user's
            continue
        if (int(its_session) == session or marked) and state not in "ZX":
            found.append(int(entry.name))
    return found

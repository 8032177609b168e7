"""Finding and ending the processes of a cluster, and running short commands.

Everything that a cluster starts carries its directory in the environment, and children inherit it: so what belongs
to it is found again even when no record of it was written.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from .errors import ClusterError

__all__ = ["MARK", "daemon_environment", "do", "end", "marked", "until_gone"]

MARK = "TMINUS_TESTCLUSTER"
_COMMAND_TIMEOUT_SECONDS = 60.0


def daemon_environment(directory: Path) -> dict[str, str]:
    """A small environment with the mark: what the caller's shell has set is no concern of a daemon's."""
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {"PATH": path, "LANG": "C.UTF-8", "HOME": "/root", MARK: str(directory)}


def do(command: Sequence[str], *, text: str | None = None, environment: dict[str, str] | None = None) -> str:
    """Run a short command; returns what it printed.

    Args:
        command: the words.
        text: its standard input.
        environment: this process's if None.

    Raises:
        ClusterError: it failed, with what it said.
    """
    try:
        done = subprocess.run(
            command,
            input=text if text is not None else "",
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_SECONDS,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"{' '.join(command)} has not ended in {_COMMAND_TIMEOUT_SECONDS:.0f} s") from error
    if done.returncode != 0:
        said = done.stderr.strip() or done.stdout.strip() or "nothing"
        raise ClusterError(f"{' '.join(command)} ended with {done.returncode} and said: {said}")
    return done.stdout


def marked(directory: Path) -> list[int]:
    """The living processes of the cluster in ``directory``, this one and its ancestors aside."""
    entry_of_it = f"{MARK}={directory}".encode()
    mine = _self_and_ancestors()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in mine:
            continue
        with suppress(OSError):  # it has ended
            if entry_of_it in (entry / "environ").read_bytes().split(b"\0") and _is_alive(int(entry.name)):
                found.append(int(entry.name))
    return found


def end(pids: Iterable[int]) -> None:
    """Kill them."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def until_gone(directory: Path, timeout_seconds: float = 10.0) -> list[int]:
    """Kill the cluster's processes until there are none; returns those that will not go."""
    deadline = time.monotonic() + timeout_seconds
    left = set(marked(directory))
    while left and time.monotonic() < deadline:
        end(left)
        time.sleep(0.02)
        # One that is ending has no environment any more, but still holds its namespaces.
        left = {pid for pid in left if _is_alive(pid)} | set(marked(directory))
    return sorted(left)


def _is_alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def _self_and_ancestors() -> set[int]:
    pid, found = os.getpid(), {0}
    while pid not in found:
        found.add(pid)
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
    return found

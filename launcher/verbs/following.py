"""Following a run: what its ranks print, as it comes, until it has ended."""

from __future__ import annotations

import shlex
import signal
import time
from pathlib import Path

import yaml

from launcher.clusters.attempts import refusal
from launcher.clusters.folders import shown
from launcher.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_REQUEST, EXIT_RESUMABLE
from launcher.rundir import RunDirectory
from launcher.verbs.view import View, read_status, views

__all__ = ["Follower", "follow"]

_POLL_SECONDS = 0.2
_LOOK_SECONDS = 2.0
"""Between two looks at whether the run is still at work; SLURM is asked for that."""


def follow(run: RunDirectory, with_logs: bool) -> int:
    """Wait until a run has ended; returns the exit code that says how. Ctrl-C ends the waiting alone.

    Args:
        run: submitted, or being trained.
        with_logs: whether to print what its ranks print.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        Follower(run, None if with_logs else -1, None).follow()
    except KeyboardInterrupt:
        print(f"the run goes on: launch status {shlex.quote(shown(run.path))}")
        return EXIT_RESUMABLE
    finally:
        signal.signal(signal.SIGINT, before)
    if reason := refusal(run):
        print(f"the run {run.id} is as it was, the last attempt at it was refused: {reason}")
        return EXIT_REQUEST
    (view,) = views([run])
    explained = f": {view.explanation}" if view.explanation else ""
    print(f"the run {view.name} is {view.condition}{explained}")
    return {"finished": EXIT_FINISHED, "resumable": EXIT_RESUMABLE}.get(view.condition, EXIT_FAILED)


class Follower:
    """Prints what has been added to the logs since it looked last.

    Args:
        run: whose.
        rank: only this one, without a prefix; None: all.
        attempt: None: the newest, and those that follow it.
    """

    def __init__(self, run: RunDirectory, rank: int | None, attempt: int | None) -> None:
        self._run = run
        self._rank = rank
        self._chosen = attempt
        self._read: dict[Path, int] = {}
        self.has_shown = False

    @property
    def attempt(self) -> int:
        """The attempt that is shown."""
        return self._chosen if self._chosen is not None else max(self._run.begun_attempts(), default=0)

    def show_new(self) -> None:
        """Each rank's whole new lines."""
        attempt = self.attempt
        hosts, per_node = _places(self._run, attempt)
        for rank, path in self._run.rank_logs(attempt).items():
            if self._rank not in (None, rank):
                continue
            node = rank // per_node if per_node else 0
            host = f"{hosts[node]} " if node < len(hosts) else ""
            prefix = f"[{host}rank {rank}] " if self._rank is None else ""
            for line in self._new_lines(path):
                self.has_shown = True
                print(prefix + line, flush=True)

    def follow(self) -> None:
        """Until the run has ended, or the attempt that was asked for has."""
        looked = 0.0
        while True:
            if time.monotonic() - looked > _LOOK_SECONDS:
                (view,) = views([self._run])
                looked = time.monotonic()
            ends = not _goes_on(view, self._chosen)  # looked at before reading: what it wrote last is read too
            self.show_new()
            if ends:
                return
            time.sleep(_POLL_SECONDS)

    def _new_lines(self, path: Path) -> list[str]:
        with path.open("rb") as file:
            start = self._read.get(path, 0)
            file.seek(start)
            data = file.read()
        whole = data.rfind(b"\n") + 1
        self._read[path] = start + whole
        return data[:whole].decode("utf-8", errors="replace").splitlines()


def _goes_on(view: View, chosen: int | None) -> bool:
    if chosen is not None and view.status is not None and view.status.attempt > chosen:
        return False
    return view.is_alive is not False


def _places(run: RunDirectory, attempt: int) -> tuple[tuple[str, ...], int]:
    """The nodes of an attempt and the workers on each, as far as they are known; those of the newest attempt are."""
    try:
        cluster = yaml.safe_load(run.config_of(attempt).read_text(encoding="utf-8"))["cluster"]
        per_node = int(cluster["processes_per_node"] or 0)
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return (), 0
    status = read_status(run)
    return (status.hosts, per_node) if status is not None and status.attempt == attempt else ((), per_node)

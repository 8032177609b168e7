"""``launch logs RUN``: what the ranks have printed, each line with its rank and node where several are shown."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from launcher.errors import EXIT_FINISHED, RunError
from launcher.rundir import RunDirectory
from launcher.rundir.find import find_run
from launcher.verbs.view import View, read_status, views
from launcher.verbs.words import VerbParser

__all__ = ["act"]

_POLL_SECONDS = 0.2
_LOOK_SECONDS = 2.0
"""Between two looks at whether the run is still at work; SLURM is asked for that."""


def act(words: Sequence[str]) -> int:
    """Print logs; returns the exit code.

    Raises:
        RunError: no run is meant, or several; or it has no such log.
    """
    options = _parser().parse_args(list(words))
    run = find_run(options.run, Path(options.runs_root))
    begun = run.begun_attempts()
    if options.attempt is not None and options.attempt not in begun:
        known = ", ".join(map(str, begun)) or "none has begun"
        raise RunError(f"--attempt {options.attempt}: the run {run.path} has no such attempt. There are: {known}.")
    if not begun and not options.follow:
        (view,) = views([run])
        raise RunError(f"The run {run.path} has no logs yet: it is {view.condition}. launch logs -f waits for them.")
    follower = _Follower(run, options.rank, options.attempt)
    try:
        if options.follow:
            follower.follow()
        else:
            follower.show_new()
            if not follower.has_shown and options.rank is not None:
                ranks = ", ".join(map(str, run.rank_logs(follower.attempt))) or "none"
                raise RunError(
                    f"--rank {options.rank}: attempt {follower.attempt} has no such log. There are: {ranks}."
                )
    except (KeyboardInterrupt, BrokenPipeError):
        pass
    return EXIT_FINISHED


def _parser() -> VerbParser:
    parser = VerbParser("logs", "Print what the ranks of a run have printed, one after the other.")
    parser.add_argument("--rank", type=int, metavar="R", help="only this one, as it is")
    parser.add_argument("--attempt", type=int, metavar="A", help="the newest if not given")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run has ended")
    return parser


class _Follower:
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

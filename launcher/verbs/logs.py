"""``launch logs RUN``: what the ranks have printed, each line with its rank and node where several are shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher.errors import EXIT_FINISHED, RunError
from launcher.rundir.find import find_run
from launcher.verbs.following import Follower
from launcher.verbs.view import views
from launcher.verbs.words import VerbParser

__all__ = ["act"]


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
    if not begun:
        (view,) = views([run])
        if view.is_alive is False:
            explained = f" ({view.explanation})" if view.explanation else ""
            raise RunError(f"The run {run.path} has no logs, and none will come: it is {view.condition}{explained}.")
    if not begun and not options.follow:
        raise RunError(f"The run {run.path} has no logs yet: it is {view.condition}. launch logs -f waits for them.")
    follower = Follower(run, options.rank, options.attempt)
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

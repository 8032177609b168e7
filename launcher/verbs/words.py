"""What the verbs' command lines have in common, and how times are told."""

from __future__ import annotations

import argparse
import time
from typing import Never

from launcher.errors import RequestError

__all__ = ["VerbParser", "ago"]

_MINUTE, _HOUR, _DAY = 60, 3600, 86400


class VerbParser(argparse.ArgumentParser):
    """A verb's command line; its errors are put like all others of the command.

    Args:
        verb: the word.
        description: what it does, for ``--help``.
        takes_run: whether the first argument is RUN.
    """

    def __init__(self, verb: str, description: str, takes_run: bool = True) -> None:
        super().__init__(prog=f"launch {verb}", description=description, allow_abbrev=False)
        if takes_run:
            self.add_argument(
                "run", metavar="RUN", help="a path, an id, an unambiguous beginning of one, or latest (begun last)"
            )
        self.add_argument("--runs-root", default="runs", metavar="FOLDER", help="the folder of all runs")

    def error(self, message: str) -> Never:
        """Raises RequestError, with the usage."""
        raise RequestError(f"{self.prog}: {message}. {self.format_usage().strip()}")


def ago(moment: float) -> str:
    """How long ago, in one unit; ``moment`` in seconds since 1970."""
    seconds = max(0.0, time.time() - moment)
    for size, unit in ((_DAY, "d"), (_HOUR, "h"), (_MINUTE, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"

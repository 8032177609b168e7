"""Writing to a terminal that may be gone: a closed pipe or a lost connection must not end a run."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import TextIO

__all__ = ["Terminal", "say"]


class Terminal(io.TextIOBase):
    """A stream that keeps quiet once nobody listens any more.

    Args:
        stream: what to write to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.show: Callable[[str], None] = self._write_line
        """Shows one line of what the user's own code prints; a live display puts itself in its place."""

    def write(self, text: str) -> int:
        """All of ``text``, or nothing."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            pass  # the run goes on; its logs have everything
        return len(text)

    def isatty(self) -> bool:
        """Whether a person may be looking."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Of the stream."""
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a property in the standard library too
        """Of the stream."""
        return self._stream.encoding

    def _write_line(self, line: str) -> None:
        self.write(line + "\n")


def say(text: str, error: bool = False) -> None:
    """One message of the launching process, to stdout or stderr."""
    Terminal(sys.stderr if error else sys.stdout).write(text + "\n")

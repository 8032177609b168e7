"""Where a rank's output goes: all of it to the rank's own log; what rank 0 prints, to the terminal too."""

from __future__ import annotations

import faulthandler
import io
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from launcher.observe.terminal import Terminal

__all__ = ["Streams", "redirect_to_log"]


class _Tee(io.TextIOBase):
    """Writes to the log, and shows whole lines on the terminal."""

    def __init__(self, log: TextIO, terminal: Terminal) -> None:
        self._log = log
        self._terminal = terminal
        self._unfinished = ""

    def write(self, text: str) -> int:
        self._log.write(text)
        *lines, self._unfinished = (self._unfinished + text).split("\n")
        for line in lines:
            self._terminal.show(line)
        return len(text)

    def flush(self) -> None:
        self._log.flush()


@dataclass(frozen=True)
class Streams:
    """What a worker's stdout and stderr were before they went to its log."""

    terminal: Terminal | None
    """stdout, for rank 0; the others are not to use it."""
    errors: Terminal
    """stderr, for a last message."""


def redirect_to_log(path: Path, rank: int) -> Streams:
    """Send this process's stdout and stderr (of C libraries too) to ``path``; returns what they were."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    terminal = Terminal(os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)) if rank == 0 else None
    errors = Terminal(os.fdopen(os.dup(2), "w", encoding="utf-8", buffering=1))
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1, closefd=False)
    if terminal is not None:
        sys.stdout = _Tee(sys.stdout, terminal)
    faulthandler.enable(file=2)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.captureWarnings(True)
    return Streams(terminal, errors)

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

__all__ = ["Streams", "redirect_to_log"]


class _Tee(io.TextIOBase):
    """Writes to the log and to the terminal."""

    def __init__(self, log: TextIO, terminal: TextIO) -> None:
        self._log = log
        self._terminal = terminal

    def write(self, text: str) -> int:
        self._log.write(text)
        self._terminal.write(text)
        return len(text)

    def flush(self) -> None:
        self._log.flush()
        self._terminal.flush()


@dataclass(frozen=True)
class Streams:
    """What a worker's stdout and stderr were before they went to its log."""

    terminal: TextIO | None
    """stdout, for rank 0; the others are not to use it."""
    errors: TextIO
    """stderr, for a last message."""


def redirect_to_log(path: Path, rank: int) -> Streams:
    """Send this process's stdout and stderr (of C libraries too) to ``path``; returns what they were."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    terminal = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1) if rank == 0 else None
    errors = os.fdopen(os.dup(2), "w", encoding="utf-8", buffering=1)
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

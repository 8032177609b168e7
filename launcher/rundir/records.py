"""Writing JSON so that a reader, or a crash, never meets half of it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

__all__ = [
    "append_json_line",
    "drop_cut_line",
    "open_to_append",
    "read_json",
    "read_json_lines",
    "write_json",
    "write_text",
]

_LONGEST_LINE = 2**20
"""Bytes; far more than any line has."""


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` as a whole: a temporary file beside it, synced, then renamed."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def append_json_line(path: Path, value: Any) -> None:
    """One line at the end, in one write: lines of several processes do not mix."""
    with open_to_append(path) as file:
        file.write(json.dumps(value) + "\n")


def open_to_append(path: Path) -> TextIO:
    """A file of lines, made if need be so that only its owner can write; each line goes out at once."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    return os.fdopen(descriptor, "a", encoding="utf-8", buffering=1)


def read_json_lines(path: Path) -> Iterator[Any]:
    """The values in a file of lines, if there is one; a line that a crash has cut is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def drop_cut_line(path: Path) -> None:
    """Take away what a crash has left of a last line, so that the next begins at the start of one."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        start = file.seek(max(0, size - _LONGEST_LINE))
        file.truncate(start + file.read().rfind(b"\n") + 1)

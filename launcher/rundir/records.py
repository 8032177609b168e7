"""Writing JSON so that a reader, or a crash, never meets half of it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from launcher.errors import RunError

__all__ = [
    "append_json_line",
    "damaged",
    "drop_cut_line",
    "open_to_append",
    "read_json",
    "read_json_lines",
    "recording",
    "tail_lines",
    "write_json",
    "write_text",
]

_LONGEST_LINE = 2**20
"""Bytes; far more than any line has."""
_TAIL_BYTES = 2**16


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
    """The value in a JSON file.

    Raises:
        OSError: it cannot be read.
        RunError: it holds no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise damaged(path, f"it is not JSON ({error})") from error


@contextmanager
def recording(place: Path) -> Iterator[None]:
    """Around what is written down about a run from outside its workers.

    Raises:
        RunError: a file cannot be written, or not be read: the disk is full, the file server is gone, …
    """
    try:
        yield
    except OSError as error:
        file = f": {error.filename}" if error.filename else ""
        raise RunError(
            f"{place} cannot be written to ({error.strerror or error}{file}). Mend that, make room for one, and give "
            "the command again."
        ) from error


def damaged(path: Path, reason: str) -> RunError:
    """The error to raise for a file of a run that does not hold what it should."""
    return RunError(f"{path} is damaged: {reason}. Move it away, and the run can do without it.")


def append_json_line(path: Path, value: Any) -> None:
    """One line at the end, in one write: lines of several processes do not mix."""
    with open_to_append(path) as file:
        file.write(json.dumps(value) + "\n")


def open_to_append(path: Path) -> TextIO:
    """A file of lines, made if need be so that only its owner can write; each line goes out at once."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    return os.fdopen(descriptor, "a", encoding="utf-8", buffering=1)


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of lines, if there is one; a line that a crash has cut is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


def tail_lines(path: Path) -> list[str]:
    """The lines near the end of a file; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def drop_cut_line(path: Path) -> None:
    """Take away what a crash has left of a last line, so that the next begins at the start of one."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        start = file.seek(max(0, size - _LONGEST_LINE))
        file.truncate(start + file.read().rfind(b"\n") + 1)

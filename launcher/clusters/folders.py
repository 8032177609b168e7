"""The folder that a command works in, which may be another than the one it was typed in."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["move_to", "shown"]

_typed_in: list[Path] = []
"""The folder that the command was typed in, once it has moved."""


def move_to(folder: Path) -> None:
    """Make ``folder`` the current one, and its modules the first to be found, here and in the workers."""
    _typed_in.append(Path.cwd())
    os.chdir(folder)
    sys.path.insert(0, str(folder))


def shown(path: Path) -> str:
    """How the user would write it: relative to where the command was typed, where that is shorter."""
    relative = os.path.relpath(path, _typed_in[0] if _typed_in else Path.cwd())
    return relative if len(relative) < len(str(path)) else str(path)

"""Who else could have written what is about to be loaded."""

from __future__ import annotations

import os
import stat
from pathlib import Path

__all__ = ["writable_by_others"]


def writable_by_others(path: Path) -> str | None:
    """Why another user could have changed a file or folder; None if none could but the administrator.

    A link is judged by itself: whoever can replace it decides what it leads to.
    """
    found = os.lstat(path)
    if found.st_uid not in (os.geteuid(), 0):
        return f"{path} belongs to another user (uid {found.st_uid})"
    if stat.S_ISLNK(found.st_mode):
        return None
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        return f"{path} can be written by every user (mode {stat.S_IMODE(found.st_mode):o})"
    if found.st_mode & stat.S_IWGRP:
        return f"{path} can be written by its group (mode {stat.S_IMODE(found.st_mode):o})"
    return None

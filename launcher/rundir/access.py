"""What this process and its children write, nobody else can write into."""

from __future__ import annotations

import os
import stat

__all__ = ["restrict_umask"]


def restrict_umask() -> None:
    """Take the right to write from group and others in whatever is made from now on. A stricter umask stays."""
    before = os.umask(0o077)
    os.umask(before | stat.S_IWGRP | stat.S_IWOTH)

"""Where a run comes from: command line, code, versions, hosts. Best effort: nothing here can fail a run."""

from __future__ import annotations

import getpass
import hashlib
import importlib.metadata
import platform
import shlex
import socket
import subprocess
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from launcher import __version__

__all__ = ["provenance"]

_GIT_TIMEOUT_SECONDS = 10.0
_DISTRIBUTIONS = ("torch", "hydra-core", "omegaconf", "numpy")


def provenance(command: Sequence[str], folder: Path) -> dict[str, Any]:
    """What ``provenance.json`` holds for a run that ``command`` started in ``folder``."""
    return {
        "command": shlex.join(command),
        "folder": str(folder),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "user": _user(),
        "hosts": [socket.gethostname()],
        "git": _git(folder),
        "versions": {"tminus": __version__, "python": platform.python_version(), **_versions()},
        "platform": platform.platform(),
    }


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in some containers
        return None


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _git(folder: Path) -> dict[str, Any] | None:
    """Commit and digest of what is not committed; None outside a repository or without git."""
    commit = _git_output(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    difference = _git_output(folder, "diff", "HEAD", "--no-ext-diff", "--binary")
    return {
        "commit": commit.decode().strip(),
        "uncommitted_sha256": hashlib.sha256(difference).hexdigest() if difference else None,
    }


def _git_output(folder: Path, *arguments: str) -> bytes | None:
    try:
        completed = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            timeout=_GIT_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return completed.stdout if completed.returncode == 0 else None

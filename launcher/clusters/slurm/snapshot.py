"""The user's project as it is now, copied into a run, so that a job runs what was submitted, whenever it starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.errors import RequestError
from launcher.rundir import RunDirectory

__all__ = ["take_snapshot"]

_GIT_TIMEOUT_SECONDS = 60.0
_NEVER = frozenset(
    {".git", ".sweeps", "__pycache__", ".venv", "venv", "node_modules", ".mypy_cache", ".pytest_cache", ".ruff_cache"}
)
"""Folders that are no part of a project, whatever .gitignore says."""
_LARGEST_SHOWN = 5
_MIB = 2**20


def take_snapshot(project: Path, target: Path, runs_root: Path, limit_mib: float) -> int:
    """Copy a project's files: what git knows, and what it does not but does not ignore either; links as links.

    Args:
        project: the folder that the command was typed in.
        target: the copy; made whole, or not at all.
        runs_root: the folder of all runs, which is left out, as are runs elsewhere in the project.
        limit_mib: the most that is copied.

    Returns:
        The bytes.

    Raises:
        RequestError: it is larger; with the largest files.
    """
    files = [path for path in _files(project) if not _is_below(project / path, runs_root)]
    files = _without_runs(project, files)
    sizes = {path: (project / path).lstat().st_size for path in files}
    total = sum(sizes.values())
    if total > limit_mib * _MIB:
        raise RequestError(_too_large(project, sizes, limit_mib))
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        for path in files:
            copy = staging / path
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(project / path, copy, follow_symlinks=False)
        os.chmod(staging, 0o755)
        os.rename(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return total


def _files(project: Path) -> list[Path]:
    """Relative to the project, in order."""
    found = _known_to_git(project)
    paths = _walk(project) if found is None else map(Path, found)
    return sorted({path for path in paths if not _NEVER & set(path.parts) and _is_file(project / path)})


def _is_file(path: Path) -> bool:
    return path.is_symlink() or path.is_file()


def _known_to_git(project: Path) -> list[str] | None:
    """By git's own rules, also outside of a repository; None without git."""
    listing = ["ls-files", "-z", "--others", "--exclude-standard"]
    inside = _git(project, "ls-files", "-z", "--cached", *listing[2:])
    if inside is not None:
        return [name for entry in inside for name in _with_repository(project, entry)]
    with tempfile.TemporaryDirectory() as empty:
        if _git(project, "init", "--quiet", "--bare", empty) is None:
            return None
        outside = _git(project, f"--git-dir={empty}", f"--work-tree={project}", *listing)
    return None if outside is None else [name for entry in outside for name in _with_repository(project, entry)]


def _with_repository(project: Path, entry: str) -> list[str]:
    """An entry of git's list; if it is a submodule or a nested repository, which git only names, then its files."""
    folder = project / entry
    if folder.is_symlink() or not (folder / ".git").exists():
        return [entry]
    return [os.path.join(entry, name) for name in _known_to_git(folder) or []]


def _git(project: Path, *words: str) -> list[str] | None:
    """What git lists; None if it fails."""
    try:
        done = subprocess.run(
            ["git", *words], cwd=project, capture_output=True, timeout=_GIT_TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return [os.fsdecode(name) for name in done.stdout.split(b"\0") if name] if done.returncode == 0 else None


def _walk(project: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(project):
        folders[:] = [
            name for name in folders if name not in _NEVER and not (Path(folder, name) / "pyvenv.cfg").exists()
        ]
        for name in names:
            yield Path(folder, name).relative_to(project)


def _is_below(path: Path, folder: Path) -> bool:
    return folder.absolute() in path.absolute().parents


def _without_runs(project: Path, files: Sequence[Path]) -> list[Path]:
    """Not what ``run_dir=`` has put into the project: each would have the copies of all before it."""
    record = RunDirectory(Path()).provenance.name
    folders = {path.parent for path in files if path.name == record}
    runs = {folder for folder in folders if RunDirectory(project / folder).config.is_file()}
    return [path for path in files if runs.isdisjoint(path.parents)]


def _too_large(project: Path, sizes: dict[Path, int], limit_mib: float) -> str:
    largest = sorted(sizes, key=lambda path: sizes[path], reverse=True)[:_LARGEST_SHOWN]
    shown = "\n".join(f"  {sizes[path] / _MIB:8.1f} MiB  {path}" for path in largest)
    return (
        f"The project in {project} has {sum(sizes.values()) / _MIB:.0f} MiB in {len(sizes)} files, more than "
        f"cluster.snapshot_limit_mib={limit_mib:g}. The largest:\n{shown}\n"
        "Name data and results in .gitignore: they are then read where they are. Or raise the limit, or run the code "
        "as it is when the job starts: cluster.snapshot=false."
    )

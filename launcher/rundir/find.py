"""Which run is meant by RUN: a path, an id, an unambiguous beginning of one, or ``latest``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher.errors import RunError
from launcher.rundir.layout import RunDirectory

__all__ = ["all_runs", "find_run"]

_SHOWN = 8


def all_runs(runs_root: Path) -> list[RunDirectory]:
    """The runs below ``runs_root``, the newest last: ``NAME/ID``, and what ``run_dir=`` has put right there."""
    root = runs_root.absolute()
    found = [path for level in ("*", "*/*") for path in root.glob(f"{level}/config.yaml") if path.is_file()]
    return [RunDirectory(path.parent) for path in sorted(found, key=lambda path: (path.stat().st_mtime_ns, path))]


def find_run(word: str, runs_root: Path) -> RunDirectory:
    """The run that ``word`` means.

    Args:
        word: a run's folder; its id, or ``name/id``, or the beginning of either; or ``latest``, the run that was
            begun last.
        runs_root: the folder of all runs.

    Raises:
        RunError: no run is meant, or several are; with the candidates.
    """
    if (Path(word) / "config.yaml").is_file():
        return RunDirectory(Path(word).absolute())
    runs = all_runs(runs_root)
    if word == "latest" and runs:
        return runs[-1]
    exact = [run for run in runs if word in _names(run)]
    meant = exact or [run for run in runs if word and any(name.startswith(word) for name in _names(run))]
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise RunError(f"{word!r} is the beginning of {len(meant)} runs: {_listed(meant)}. Write more of it.")
    if Path(word).is_dir():
        raise RunError(f"{word!r} is a folder, but not a run: it has no config.yaml.")
    if not runs:
        raise RunError(
            f"There is no run {word!r}: there are no runs below {runs_root}. Name another folder of runs with "
            "--runs-root PATH (launch resume: runs_root=PATH), or give the run's own path."
        )
    raise RunError(
        f"There is no run {word!r} below {runs_root}. RUN is a path, an id, an unambiguous beginning of one, or "
        f"latest. The newest: {_listed(runs)}."
    )


def _names(run: RunDirectory) -> tuple[str, str]:
    return run.id, f"{run.path.parent.name}/{run.id}"


def _listed(runs: Sequence[RunDirectory]) -> str:
    """``name/id`` of the newest few, the newest first."""
    newest = [_names(run)[1] for run in reversed(runs)]
    more = f", … ({len(newest) - _SHOWN} more)" if len(newest) > _SHOWN else ""
    return ", ".join(newest[:_SHOWN]) + more

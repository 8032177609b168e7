"""What tells the runs of one sweep apart: the values that they do not share, as their configurations say."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from launcher.rundir.layout import RunDirectory
from launcher.rundir.records import read_json

__all__ = ["distinctions"]

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Ten times as fast, where PyYAML was built with it."""
_OF_THE_RUN = ("run_dir",)


def distinctions(runs: Sequence[RunDirectory]) -> dict[Path, str]:
    """For each of the runs that a sweep has begun (``launch -m``), such as ``optimizer.lr=0.01``, by its directory.

    Runs of one command line are compared with each other; one that is alone differs in nothing.
    """
    sweeps: dict[str, dict[Path, dict[str, str]]] = {}
    for run in runs:
        command = _sweep(run)
        if command is not None:
            sweeps.setdefault(command, {})[run.path] = _values(run)
    return {path: words for sweep in sweeps.values() for path, words in _compared(sweep)}


def _compared(sweep: dict[Path, dict[str, str]]) -> Iterator[tuple[Path, str]]:
    keys = dict.fromkeys(key for values in sweep.values() for key in values if key not in _OF_THE_RUN)
    differing = [key for key in keys if len({values.get(key) for values in sweep.values()}) > 1]
    for path, values in sweep.items():
        yield path, " ".join(f"{key}={values[key]}" for key in differing if key in values)


def _sweep(run: RunDirectory) -> str | None:
    """The command line, if it is a sweep's."""
    try:
        command = str(read_json(run.provenance)["command"])
        return command if {"-m", "--multirun"} & set(shlex.split(command)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _values(run: RunDirectory) -> dict[str, str]:
    try:
        tree = yaml.load(run.config.read_text(encoding="utf-8"), Loader=_LOADER)
    except (OSError, yaml.YAMLError):
        return {}
    return dict(_flat(tree, ""))


def _flat(tree: Any, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, "null" if tree is None else str(tree)

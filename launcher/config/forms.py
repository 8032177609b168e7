"""Values in SLURM's own form, or another that a field of ``cluster`` does not take, in the form that it does."""

from __future__ import annotations

import math
import re

__all__ = ["own_form", "verbatim"]

_TO_GIB = {"k": 2**-20, "m": 2**-10, "g": 1.0, "t": 2**10}
_TO_MINUTES = {"s": 1 / 60, "m": 1, "h": 60, "d": 24 * 60}
_SBATCH_NAMES = {"time": "cluster.time_limit_min", "mem": "cluster.memory_gib", "gpus": "cluster.gpus_per_node"}
"""Options of sbatch that have a field with quite another name."""


def own_form(key: str, value: str) -> str:
    """What to write in place of a value that is not the number that a field wants; empty if nobody can tell.

    Args:
        key: of the field, whole.
        value: as it was given.
    """
    text = value.strip().lower()
    if key == "cluster.gpus_per_node":
        return f" {_gpus(value.strip())}"
    if key == "cluster.time_limit_min":
        minutes = _minutes(text)
        return f" Minutes, as a whole number: {key}={90 if minutes is None else minutes}."
    if key in ("cluster.memory_gib", "cluster.snapshot_limit_mib"):
        unit, factor = ("GiB", 1.0) if key.endswith("gib") else ("MiB", 2.0**10)
        size = _gib(text)
        return f" {unit}, as a number alone: {key}={64 if size is None else f'{size * factor:g}'}."
    if key.endswith("_seconds"):
        duration = _duration(text)
        return f" Seconds, as a whole number: {key}={120 if duration is None else round(60 * duration)}."
    if key in ("cluster.max_parallel_jobs", "cluster.processes_per_node", "cluster.cpus_per_task"):
        return f" A whole number, such as {key}=4, or null, the default."
    return ""


def verbatim(word: str) -> str:
    """What to do about a key of ``cluster`` that is not there, and may be an option of sbatch."""
    option = word.lstrip("-").replace("_", "-")
    if option in _SBATCH_NAMES:
        return f" What sbatch calls --{option} is {_SBATCH_NAMES[option]} here."
    return f" An option of sbatch is passed on as it is: +cluster.sbatch.{option}=…"


def _gpus(value: str) -> str:
    found = re.fullmatch(r"(?:gpu:)?(?P<kind>[A-Za-z][\w.-]*):(?P<number>\d+)", value)
    kind, number = (found["kind"], found["number"]) if found else ("a100", "2")
    return (
        f"How many: cluster.gpus_per_node={number}. Their kind goes to sbatch as it is, as a feature "
        f"of the nodes (sinfo --format=%f lists them): +cluster.sbatch.constraint={kind}."
    )


def _minutes(text: str) -> int | None:
    """Of sbatch's forms of a time, and of such as 90m or 2h; rounded up."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None:
        minutes = _duration(text)
        return None if minutes is None else math.ceil(minutes)
    days, *rest = found.groups()
    given = [int(part) for part in rest if part is not None]
    if days is not None:  # D-HH, D-HH:MM, D-HH:MM:SS
        hours, minutes_, seconds = [*given, 0, 0][:3]
        return int(days) * 24 * 60 + hours * 60 + minutes_ + math.ceil(seconds / 60)
    if len(given) == 3:
        return given[0] * 60 + given[1] + math.ceil(given[2] / 60)
    return given[0] + math.ceil(sum(given[1:]) / 60)  # MM, MM:SS


def _duration(text: str) -> float | None:
    """In minutes, of a number with a unit."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])[a-z]*", text)
    return None if found is None else float(found[1]) * _TO_MINUTES[found[2]]


def _gib(text: str) -> float | None:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt])(?:i?b)?", text)
    return None if found is None else float(found[1]) * _TO_GIB[found[2]]

"""Two configurations of one run: what differs, and what of it must not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from launcher.config.schema import RunConfig
from launcher.config.words import shown

__all__ = ["Difference", "differences", "fixed_differences"]

_FIXED = ("name", "seed", "optimizer._target_")
_OF_THE_COMMAND = ("run_dir", "runs_root")
"""Where a run is, not what it is."""


@dataclass(frozen=True)
class Difference:
    """One field with two values."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key}: {shown(self.before)} there, {shown(self.after)} here"


def differences(before: RunConfig, after: RunConfig) -> list[Difference]:
    """Every field that has another value, but for where the run is."""
    old, new = _flat(before), _flat(after)
    keys = dict.fromkeys([*old, *new])
    return [
        Difference(key, old.get(key), new.get(key))
        for key in keys
        if old.get(key) != new.get(key) and key not in _OF_THE_COMMAND
    ]


def fixed_differences(before: RunConfig, after: RunConfig, job_may_change: bool) -> list[Difference]:
    """Those that would make it another run: its data or their order, its model, its kind of optimizer.

    Args:
        before: of the run so far.
        after: of its next attempt.
        job_may_change: whether the job's arguments may differ (not its class).
    """
    return [
        difference
        for difference in differences(before, after)
        if difference.key in _FIXED
        or difference.key == "job._target_"
        or (difference.key.startswith("job.") and not job_may_change)
    ]


def _flat(config: RunConfig) -> dict[str, Any]:
    tree = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    return dict(_leaves("", tree))


def _leaves(prefix: str, node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), value)
    else:
        yield prefix, node

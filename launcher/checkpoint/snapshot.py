"""What is saved: a learner's state as tensors that the ranks share, values of this rank alone, and numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from launcher.checkpoint.manifest import Manifest
from launcher.errors import JobError

__all__ = ["Snapshot", "local_part", "require_plain"]

_SIMPLE = (bool, int, float, str, bytes, type(None))


@dataclass(frozen=True)
class Snapshot:
    """The state after a step. Nothing is copied yet: it changes with the next step."""

    tensors: dict[str, Tensor]
    """By name: DTensors are shards; plain tensors are the same on all ranks that have them."""
    private: dict[str, Any]
    """This rank's alone: tensors and plain values, in dicts and lists."""
    manifest: Manifest
    """The same on all ranks; its files are not known yet."""


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds, as a plain tensor without a gradient."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():  # its own tensor as it is: a detached DTensor would cost six times as much
            tensor = tensor.to_local()
    return tensor.detach()


def require_plain(value: Any, where: str) -> None:
    """Refuse what could not be loaded again without running code.

    Raises:
        JobError: naming the entry.
    """
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, (str, int)):
                raise JobError(f"{where} has the key {key!r}: use strings or whole numbers.")
            require_plain(entry, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, entry in enumerate(value):
            require_plain(entry, f"{where}[{index}]")
    elif not isinstance(value, Tensor) and type(value) not in _SIMPLE:
        raise JobError(
            f"{where} is a {type(value).__module__}.{type(value).__name__}, which a checkpoint does not hold: use "
            "numbers, strings, lists, dicts and torch tensors (torch.from_numpy for NumPy's arrays)."
        )

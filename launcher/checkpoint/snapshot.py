"""What is saved: a learner's state as tensors that the ranks share, values of this rank alone, and numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from launcher.checkpoint.manifest import Manifest
from launcher.errors import JobError

__all__ = ["Snapshot", "local_part", "plain", "plain_dict"]

_KEYS = (str, int, bool)
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


def plain(value: Any, where: str) -> Any:
    """``value`` as it will be loaded: dicts of any kind as plain ones, tensors without a graph; nothing is copied.

    Raises:
        JobError: naming the entry that could not be loaded again without running code.
    """
    if isinstance(value, dict):
        for key in value:
            if type(key) not in _KEYS:
                raise JobError(f"{where} has the key {key!r}: use plain strings or whole numbers.")
        return {key: plain(entry, f"{where}[{key!r}]") for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(entry, f"{where}[{index}]") for index, entry in enumerate(value))
    if type(value) in _SIMPLE:
        return value
    if type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_quantized:
        return value.detach()
    kind = f"{type(value).__module__}.{type(value).__name__}"
    special = f"{kind} of {value.dtype}, {value.layout}" if type(value) is Tensor else kind
    raise JobError(
        f"{where} is a {special}, which a checkpoint does not hold: use "
        "numbers, strings, lists, dicts and dense torch tensors (torch.from_numpy for NumPy's arrays)."
    )


def plain_dict(value: Any, where: str) -> dict[str, Any]:
    """``plain``, of a dict and nothing else."""
    if not isinstance(value, dict):
        raise JobError(
            f"{where} is a {type(value).__name__} instead of a dict: return a dict, an empty one for nothing."
        )
    found: dict[str, Any] = plain(value, where)
    return found

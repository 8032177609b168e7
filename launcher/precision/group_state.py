"""What an optimizer keeps in its ``param_groups``: what has changed there since it was built is state, not settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["GroupState"]

_NOT_STATE = ("params", "lr")
"""Parameters have names of their own, and the schedule sets the rate in every step."""
_ABSENT = object()


class GroupState:
    """The groups of an optimizer, beside how they were built.

    An entry that is as it was built is left out, so that a resumed run may be given another value of it.

    Args:
        optimizer: freshly built.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._built = [
            {key: _copied(value) for key, value in group.items() if key not in _NOT_STATE}
            for group in optimizer.param_groups
        ]

    def changed(self) -> list[dict[str, Any]]:
        """By group: the entries that are new or have another value than at first; not copied."""
        return [
            {
                key: value
                for key, value in group.items()
                if key not in _NOT_STATE and not _same(value, built.get(key, _ABSENT))
            }
            for group, built in zip(self._optimizer.param_groups, self._built, strict=True)
        ]


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (list, tuple):
        return type(value)(_copied(entry) for entry in value)
    if type(value) is dict:
        return {key: _copied(entry) for key, entry in value.items()}
    return value


def _same(value: Any, built: Any) -> bool:
    if isinstance(value, Tensor) and isinstance(built, Tensor):
        return value.device == built.device and value.dtype == built.dtype and torch.equal(value, built)
    if value is built or type(value) is not type(built):
        return value is built
    if type(value) in (list, tuple):
        return len(value) == len(built) and all(map(_same, value, built))
    if type(value) is dict:
        return value.keys() == built.keys() and all(_same(entry, built[key]) for key, entry in value.items())
    return bool(value == built)

"""Groups of ranks on CPUs that nobody else uses: gloo, which torch does not know of and which goes with its holder.

torch's ``new_group``, if only its members call it, names a group by how many groups each is in; members that are in
unequally many wait for each other in vain. And what it makes stays until the process ends.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

__all__ = ["Group", "connect", "timeout_of"]


class Group(Protocol):
    """What is used of such a group, which torch's process groups have too."""

    def size(self) -> int:
        """How many ranks."""

    def send(self, tensors: list[Tensor], rank: int, tag: int, /) -> dist.Work:
        """Start to send one tensor."""

    def recv(self, tensors: list[Tensor], rank: int, tag: int, /) -> dist.Work:
        """Start to receive one tensor."""

    def allreduce(self, tensors: list[Tensor], /) -> dist.Work:
        """Start to sum one tensor in place."""


def connect(name: str, rank: int, size: int, timeout: timedelta | None) -> Group:
    """Connect ranks; collective over them.

    Args:
        name: theirs alone, for as long as the job runs.
        rank: within the group.
        size: of the group.
        timeout: of each operation; None: the backend's default.
    """
    store = PrefixStore(f"tminus/{name}", _get_default_store())
    gloo: Any = dist.ProcessGroupGloo
    group: Group = gloo(store, rank, size) if timeout is None else gloo(store, rank, size, timeout)
    return group


def timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    """How long a group on CPUs waits; None, the backend's default, where it cannot be told: torch has no public way."""
    backend = group._get_backend(torch.device("cpu"))
    timeout: timedelta | None = getattr(getattr(backend, "options", None), "_timeout", None)
    return timeout

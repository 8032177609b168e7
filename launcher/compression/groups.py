"""Groups of ranks on CPUs that nobody else uses: gloo, of which torch does not know.

torch's ``new_group``, if only its members call it, names a group by how many groups each is in; members that are in
unequally many wait for each other in vain. Private calls into torch: the default group and its store, and the
time-out of a group.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _get_default_group, _get_default_store

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


_connected: WeakKeyDictionary[dist.ProcessGroup, list[Group]] = WeakKeyDictionary()
"""By the default group: until torch destroys that one and with it all of its own. A group that is freed waits for all
that is under way and for gloo's threads, which a forked child does not have; none should be freed in mid-training."""


def connect(name: str, rank: int, size: int, timeout: timedelta | None) -> Group:
    """Connect ranks; collective over them.

    To be called in one order on every rank, in the main thread: who waits for a peer keeps all others from the store.

    Args:
        name: theirs alone, for as long as the job runs.
        rank: within the group.
        size: of the group.
        timeout: of each operation; None: the backend's default.
    """
    store = PrefixStore(f"tminus/{name}", _get_default_store())
    gloo: Any = dist.ProcessGroupGloo
    group: Group = gloo(store, rank, size) if timeout is None else gloo(store, rank, size, timeout)
    _connected.setdefault(_get_default_group(), []).append(group)
    return group


def timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    """How long a group on CPUs waits; None, the backend's default, where it cannot be told: torch has no public way."""
    backend = group._get_backend(torch.device("cpu"))
    timeout: timedelta | None = getattr(getattr(backend, "options", None), "_timeout", None)
    return timeout

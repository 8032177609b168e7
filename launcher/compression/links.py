"""Who reduces together, and how pieces travel between them.

``Team`` is a group of ranks, on CPUs with a process group of its own, arranged by host: what is exchanged within a
host does not cross the network. ``Team.exchange`` sends to several ranks and receives from several at once, point to
point: on gloo that keeps a link busier than its collectives do, and no two ranks need to post in the same order. What
is received is announced by ``Team.expect``, long before it is sent if possible.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.compression.groups import Group, connect, timeout_of

__all__ = ["Expected", "Grid", "Parcel", "Pending", "Team", "host_key", "reduce_scatter"]

# torch 2.13 has a new name and deprecates the old one, which is all that 2.11 has.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Grid:
    """The ranks of a team as hosts × ranks of a host; one rank for each "host" if hosts are unequal or only one."""

    ranks: tuple[tuple[int, ...], ...]
    """(num_hosts, ranks_per_host): ranks within the team."""
    host: int
    """This rank's row."""
    place: int
    """This rank's column."""

    @classmethod
    def of_hosts(cls, hosts: Sequence[str], rank: int) -> Grid:
        """Arrange ranks 0, 1, … that run on ``hosts``."""
        by_host: dict[str, list[int]] = {}
        for number, host in enumerate(hosts):
            by_host.setdefault(host, []).append(number)
        rows = list(by_host.values())
        if len(rows) == 1 or len({len(row) for row in rows}) > 1:
            rows = [[number] for number in range(len(hosts))]
        row, column = next((h, members.index(rank)) for h, members in enumerate(rows) if rank in members)
        return cls(tuple(map(tuple, rows)), row, column)

    @property
    def num_hosts(self) -> int:
        """Rows."""
        return len(self.ranks)

    @property
    def ranks_per_host(self) -> int:
        """Columns."""
        return len(self.ranks[0])


def host_key() -> str:
    """The same for processes that reach each other without crossing a network, and for no others."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    network = Path("/proc/self/ns/net")
    return "/".join(
        (
            socket.gethostname(),
            boot.read_text().strip() if boot.exists() else "",
            os.readlink(network) if network.exists() else "",
        )
    )


class Parcel(NamedTuple):
    """One message; at most one under way for a pair of ranks and a tag."""

    content: Tensor
    """Contiguous."""
    peer: int
    """A rank within the team."""
    tag: int


class Pending:
    """Pieces under way."""

    def __init__(self, received: Sequence[dist.Work], sent: Sequence[dist.Work]) -> None:
        self._received = received
        self._sent = sent

    def wait(self) -> None:
        """Until everything has arrived (on CUDA: makes the current stream wait)."""
        for work in self._received:
            work.wait()

    def release(self) -> None:
        """Until what was sent may be overwritten."""
        for work in self._sent:
            work.wait()


class Expected(NamedTuple):
    """What is to be received."""

    parcels: Sequence[Parcel]
    works: Sequence[dist.Work]
    """Their receives, if posted already (gloo); else none."""


class Team:
    """A group of ranks that reduce together. Making one is collective over its ranks.

    Args:
        group: the ranks, in the order of their shards.
        device: where the gradients live.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.size = group.size()
        self.rank = group.rank()
        self.device = device
        self.bytes_sent = 0
        """By this rank, since it was last set to 0."""
        self._coalesces = device.type == "cuda"
        self._origin = group
        known = self.gather((host_key(), secrets.token_hex(16))) if self.size > 1 else [("", "")]
        self.grid = Grid.of_hosts([host for host, _ in known], self.rank)
        self._name: str = known[0][1]
        """Tells the team from all others."""
        self.group: Group = group
        """On CPUs the team's own: gloo's collectives on one group must be called in one order, and a thread of ours has
        its own. NCCL's are put in order by the streams that they run on."""
        if self.size > 1 and not self._coalesces:
            self.group = self._connect("team", self.rank, self.size)

    def gather(self, value: Any) -> list[Any]:
        """Each rank's value, which can be pickled; for when nothing is under way."""
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self._origin)
        return values

    def connect_column(self) -> Group:
        """The ranks in this place of each host, on CPUs; collective over them."""
        return self._connect(f"column {self.grid.place}", self.grid.host, self.grid.num_hosts)

    def _connect(self, name: str, rank: int, size: int) -> Group:
        return connect(f"{self._name}/{name}", rank, size, timeout_of(self._origin))

    def expect(self, receive: Sequence[Parcel]) -> Expected:
        """Get ready to receive from ranks of the team, the earlier the better.

        What arrives is written at any time from now on. gloo's senders begin when they have heard that there is room,
        and that news waits behind what is under way.
        """
        parcels = [parcel for parcel in receive if parcel.content.numel()]
        if self._coalesces:
            return Expected(parcels, ())
        return Expected(parcels, [self.group.recv([parcel.content], parcel.peer, parcel.tag) for parcel in parcels])

    def exchange(self, expected: Expected, send: Sequence[Parcel], counts: bool = True) -> Pending:
        """Start to receive what is expected, and to send to ranks of the team; ``counts``: as bytes sent."""
        send = [parcel for parcel in send if parcel.content.numel()]
        self.bytes_sent += sum(parcel.content.nbytes for parcel in send) if counts else 0
        if self._coalesces:
            # NCCL's pairwise operations wait for each other unless they are one group.
            receive = expected.parcels
            operations = [dist.P2POp(dist.irecv, p.content, group=self._origin, group_peer=p.peer) for p in receive]
            operations += [dist.P2POp(dist.isend, p.content, group=self._origin, group_peer=p.peer) for p in send]
            works = dist.batch_isend_irecv(operations) if operations else []
            return Pending(works, ())
        return Pending(expected.works, [self.group.send([parcel.content], parcel.peer, parcel.tag) for parcel in send])

    def reduce_scatter(self, target: Tensor, source: Tensor) -> Pending:
        """Start NCCL's own sum of shards, in the type of ``source``; counted as what a ring sends."""
        self.bytes_sent += (self.size - 1) * target.nbytes
        work = reduce_scatter(target, source, group=self._origin, async_op=True)
        assert work is not None
        return Pending((work,), ())

    def all_reduce(self, values: Tensor, column: Group | None = None) -> Pending:
        """Start the backend's own sum over the team, or its column, in the type of ``values``.

        Counted as what a ring sends.
        """
        group = column or self.group
        self.bytes_sent += 2 * (group.size() - 1) * values.nbytes // group.size()
        if self._coalesces:
            work = dist.all_reduce(values, group=self._origin, async_op=True)
        else:
            work = group.allreduce([values])
        assert work is not None
        return Pending((work,), ())

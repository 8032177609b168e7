"""What one chunk of an exchange works on: the same positions of every shard, and the buffers that they pass through."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor

from launcher.compression.codecs import Codec
from launcher.compression.links import Expected, Team
from launcher.compression.reduction import Reduction

__all__ = ["Buffers", "Span", "Stage"]

_LARGEST_TAG = 1 << 30


class Stage(IntEnum):
    """What a message of a chunk is for."""

    give = 0
    scatter = 1
    gather = 2
    share = 3


class Buffers:
    """The buffers of one chunk under way.

    Args:
        codec: what is sent.
        team: the ranks.
    """

    def __init__(self, codec: Codec, team: Team) -> None:
        self.num_hosts = team.grid.num_hosts
        self._codec = codec
        self._team = team
        self._numel = -1
        self.fit(0)

    def fit(self, numel: int) -> None:
        """Have room for pieces of ``numel`` values, one for each rank: room that no tensor needs would add up."""
        if numel <= self._numel:
            return
        self._numel = numel
        self.sent, self.received = torch.empty(2, self._pieces, dtype=torch.uint8, device=self._team.device)
        self.__dict__.pop("host", None)
        self.__dict__.pop("means", None)

    @cached_property
    def host(self) -> Tensor:
        """FP32: pieces of this host's other ranks, if they are sent here."""
        grid = self._team.grid
        return torch.empty((grid.ranks_per_host - 1) * grid.num_hosts * self._numel, device=self._team.device)

    @cached_property
    def means(self) -> Tensor:
        """uint8: encoded means of all owners, if they are sent here."""
        numel = self._team.grid.ranks_per_host * self._pieces
        return torch.empty(numel, dtype=torch.uint8, device=self._team.device)

    @property
    def _pieces(self) -> int:
        return self._team.grid.num_hosts * self._codec.encoded_bytes(self._numel)


@dataclass(frozen=True)
class Span:
    """Positions ``first`` to ``last`` of every shard, in one slot."""

    job: Reduction
    first: int
    last: int
    number: int
    """Of all chunks of the exchange, in the order in which they start, without gaps: the same on every rank."""
    slot: Buffers
    expected: dict[Stage, Expected] = field(default_factory=dict)
    """What is to be received in each stage; complete before the chunk sends anything."""

    @property
    def width(self) -> int:
        """How many there are."""
        return self.last - self.first

    def length(self, owner: int) -> int:
        """How many of the positions exist in an owner's shard."""
        return self.job.length(owner, self.first, self.last)

    def tag(self, stage: Stage, host: int = 0) -> int:
        """Of a message about ``host``'s part of the chunk."""
        num_hosts = self.slot.num_hosts
        return ((self.number * len(Stage) + stage) * num_hosts + host) % _LARGEST_TAG

    def piece(self, owner: int) -> Tensor:
        """This rank's own values there."""
        return self.job.piece(owner, self.first, self.last)

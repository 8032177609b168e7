"""What one chunk of an exchange works on: the same positions of every shard, and the buffers that they pass through."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from launcher.compression.codecs import Codec
from launcher.compression.links import Team
from launcher.compression.reduction import Reduction

__all__ = ["Buffers", "Span"]


class Buffers:
    """The buffers of one chunk under way."""

    def __init__(self, codec: Codec, team: Team) -> None:
        self._codec = codec
        self._team = team
        self._numel = -1
        self.fit(0)

    def fit(self, numel: int) -> None:
        """Have room for pieces of ``numel`` values, one for each rank: room that no tensor needs would add up."""
        if numel <= self._numel:
            return
        self._numel = numel
        grid, device = self._team.grid, self._team.device
        pieces = grid.num_hosts * self._codec.encoded_bytes(numel)
        self.host = torch.empty((grid.ranks_per_host - 1) * grid.num_hosts * numel, device=device)
        self.sent, self.received = torch.empty(2, pieces, dtype=torch.uint8, device=device)
        self.means = torch.empty(grid.ranks_per_host * pieces, dtype=torch.uint8, device=device)


@dataclass(frozen=True)
class Span:
    """Positions ``first`` to ``last`` of every shard, in one slot."""

    job: Reduction
    first: int
    last: int
    number: int
    """Of all chunks of the exchange, the same on every rank."""
    slot: Buffers

    @property
    def width(self) -> int:
        """How many there are."""
        return self.last - self.first

    def length(self, owner: int) -> int:
        """How many of the positions exist in an owner's shard."""
        return self.job.length(owner, self.first, self.last)

    def piece(self, owner: int) -> Tensor:
        """This rank's own values there."""
        return self.job.piece(owner, self.first, self.last)

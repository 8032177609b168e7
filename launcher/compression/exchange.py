"""The mean of a flat FP32 tensor over a team, encoded on the wire and summed in FP32, or by the backend.

Each rank owns one shard of the tensor. In pieces that travel one behind the other:

1. *give* (where hosts hold several ranks, equally many): neighbours hand pieces in FP32 to the one that stands for
   their owner, so that each host speaks with one voice and only once to the network;
2. *scatter*: each piece, divided by the number of ranks, is encoded and sent to its owner, who sums in FP32;
3. *gather* (not for a reduce-scatter): the owner encodes the mean once, and every rank, itself included, reads the
   same bytes, so that all hold the same result to the last bit;
4. *share* (where hosts hold several ranks): neighbours hand each other the encoded means that they have gathered, if
   any, and tell by it that they have read what they were given.

What a rank keeps for itself is not encoded in 2. Both encodings may have error feedback.

Where the backend sums whole means (16 bits), *sum* takes the place of 2 and 3: the ranks in one place of each host
encode what their host has for all owners in that place, and the backend adds up the hosts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from launcher.compression.arithmetic import Arithmetic
from launcher.compression.codecs import Codec, padded
from launcher.compression.groups import Group
from launcher.compression.links import Parcel, Pending, Team
from launcher.compression.neighbours import build_neighbours
from launcher.compression.pipeline import Chunk, Course, Pipeline
from launcher.compression.reduction import Reduction
from launcher.compression.span import Buffers, Span, Stage

__all__ = ["Exchange", "Sizes"]

_LEAST_CHUNKS = 2
"""Of a tensor that is not small: what one chunk waits for, another uses."""


@dataclass(frozen=True)
class Sizes:
    """How a tensor is cut."""

    message_bytes: int
    """Of an encoded piece, at most."""
    portion: int
    """Values that are encoded or decoded at once, at most."""
    num_slots: int
    """Chunks under way."""
    sum_bytes: int
    """Of a chunk that the backend sums over all ranks, encoded."""


class _Column(NamedTuple):
    """The ranks in this place of each host, over which the backend sums."""

    group: Group
    dtype: torch.dtype


class Exchange:
    """A team and a codec: cuts reductions into chunks, which a pipeline runs.

    Args:
        team: of at least two ranks.
        codec: what crosses the network.
        sizes: of messages and portions.
        sums_over_hosts: the type that ``codec`` encodes to, if the backend is to sum whole means over the hosts in it;
            not for reduce-scatters.
    """

    def __init__(self, team: Team, codec: Codec, sizes: Sizes, sums_over_hosts: torch.dtype | None = None) -> None:
        self.team = team
        self.codec = codec
        block = codec.block_size
        self._portion = padded(codec, sizes.portion)
        self._piece = max(sizes.message_bytes // codec.encoded_bytes(block), 1) * block
        self._num_slots = sizes.num_slots
        self._widest = 0
        self._numbers = count()
        self._neighbours = build_neighbours(team, codec, self._piece, sizes.num_slots)
        self._arithmetic = Arithmetic(team, codec, self._neighbours, min(self._portion, self._piece))
        self._column = None if sums_over_hosts is None else _Column(team.connect_column(), sums_over_hosts)

    @cached_property
    def pipeline(self) -> Pipeline[Buffers]:
        """The chunks' way; its buffers are made when they are first needed, and as large as any tensor has needed."""
        slots = (Buffers(self.codec, self.team) for _ in range(self._num_slots))
        waits_aside, one_by_one = self.team.device.type != "cuda", self.team.grid.ranks_per_host > 1
        return Pipeline(slots, waits_aside, one_by_one)

    def shard_size(self, numel: int) -> int:
        """Elements that each rank owns of ``numel``, in whole blocks."""
        return padded(self.codec, -(-numel // self.team.size))

    def chunks(self, reduction: Reduction) -> Iterator[Chunk]:
        """The chunks of a reduction, to be started in this order."""
        share = max(-(-reduction.shard // _LEAST_CHUNKS), min(self._portion, self._piece))
        piece = min(self._piece, padded(self.codec, share))
        self._widest = max(self._widest, min(piece, padded(self.codec, reduction.shard)))
        for first in range(0, reduction.shard, piece):
            last = min(first + piece, reduction.shard)
            yield partial(self._start, reduction, first, last)

    def _start(self, reduction: Reduction, first: int, last: int, slot: Buffers) -> Course:
        slot.fit(self._widest)
        return self._course(Span(reduction, first, last, next(self._numbers), slot))

    def _row(self, buffer: Tensor, index: int, width: int, length: int) -> Tensor:
        """An encoded piece of ``length`` values in a buffer with rows for ``width`` values."""
        start = index * self.codec.encoded_bytes(padded(self.codec, width))
        return buffer[start : start + self.codec.encoded_bytes(padded(self.codec, length))]

    def _course(self, chunk: Span) -> Course:
        """A chunk's way, from here to there and back."""
        grid, job = self.team.grid, chunk.job
        sent: list[Pending] = []

        def posted(pending: Pending) -> Pending:
            sent.append(pending)
            return pending

        self._expect(chunk)
        if grid.ranks_per_host > 1:
            yield posted(self._neighbours.give(chunk))
        if self._column is not None and job.gathers:
            yield posted(self._sum(chunk, self._column))
        else:
            yield posted(self._scatter(chunk))
            if job.gathers:
                yield posted(self._gather(chunk))
            else:
                self._arithmetic.write_means(chunk, self._received(chunk))
        shared = posted(self._neighbours.share(chunk))
        if job.gathers:
            self._read_means(chunk, grid.place)
        if grid.ranks_per_host > 1:
            yield shared
            for place in range(grid.ranks_per_host) if job.gathers else ():
                if place != grid.place:
                    self._read_means(chunk, place)
        return sent

    def _expect(self, chunk: Span) -> None:
        """Get ready to receive all that others will send for it."""
        grid = self.team.grid
        self._neighbours.expect(chunk)
        if self._column is not None and chunk.job.gathers:
            return
        length = chunk.length(self.team.rank)
        pieces, means = [], []
        for host, peer in self._peers:
            piece = self._row(chunk.slot.received, host, chunk.width, length)
            pieces.append(Parcel(piece, peer, chunk.tag(Stage.scatter)))
            if chunk.job.gathers:
                means.append(Parcel(self._mean(chunk, host, grid.place), peer, chunk.tag(Stage.gather)))
        chunk.expected[Stage.scatter] = self.team.expect(pieces)
        chunk.expected[Stage.gather] = self.team.expect(means)

    @cached_property
    def _peers(self) -> list[tuple[int, int]]:
        """(host, the rank in the same place) for each other host."""
        grid = self.team.grid
        return [(host, ranks[grid.place]) for host, ranks in enumerate(grid.ranks) if host != grid.host]

    def _scatter(self, chunk: Span) -> Pending:
        """Encode what each other host's owner is to have."""
        tag, send = chunk.tag(Stage.scatter), []
        for host, owner in self._peers:
            encoded = self._row(chunk.slot.sent, host, chunk.width, chunk.length(owner))
            self._arithmetic.encode_pieces(chunk, host, encoded, chunk.job.scattered)
            send.append(Parcel(encoded, owner, tag))
        return self.team.exchange(chunk.expected[Stage.scatter], send)

    def _received(self, chunk: Span) -> list[Tensor]:
        """What other hosts have sent this rank, encoded."""
        length = chunk.length(self.team.rank)
        return [self._row(chunk.slot.received, host, chunk.width, length) for host, _ in self._peers]

    def _gather(self, chunk: Span) -> Pending:
        """Encode the means for all hosts."""
        encoded = self._mean(chunk, self.team.grid.host, self.team.grid.place)
        self._arithmetic.encode_means(chunk, self._received(chunk), encoded)
        tag = chunk.tag(Stage.gather)
        send = [Parcel(encoded, peer, tag) for _, peer in self._peers]
        return self.team.exchange(chunk.expected[Stage.gather], send)

    def _sum(self, chunk: Span, column: _Column) -> Pending:
        """Encode what this host's ranks have for all owners in this place, and have the backend add up the hosts.

        Ranks come here with chunks in one order, as a collective needs: one starts when the one before has been here.
        """
        grid = self.team.grid
        for host in range(grid.num_hosts):
            self._arithmetic.encode_pieces(chunk, host, self._mean(chunk, host, grid.place), feedback=None)
        return self.team.all_reduce(self._neighbours.means(chunk, grid.place).view(column.dtype), column.group)

    def _mean(self, chunk: Span, host: int, place: int) -> Tensor:
        """The encoded mean of what one rank owns."""
        grid = self.team.grid
        return self._row(self._neighbours.means(chunk, place), host, chunk.width, chunk.length(grid.ranks[host][place]))

    def _read_means(self, chunk: Span, place: int) -> None:
        """Write the means that the ranks in one place of each host own to the target."""
        for host, ranks in enumerate(self.team.grid.ranks):
            self._arithmetic.read_means(chunk, ranks[place], self._mean(chunk, host, place))

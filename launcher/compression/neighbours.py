"""What the ranks of one host hand each other for a chunk: their pieces in FP32, and the encoded means that they own.

``Messages`` sends everything. ``SharedMemory`` writes it once to memory that the host's ranks have in common, where
they read it: messages say only that it is there, or has been read. On CPUs sending within a host costs more of a core
than all the arithmetic. Where they can have none, the whole team sends messages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from launcher.compression.codecs import Codec, padded
from launcher.compression.host_memory import share_memory
from launcher.compression.links import Parcel, Pending, Team
from launcher.compression.span import Span, Stage

__all__ = ["Messages", "Neighbours", "SharedMemory", "build_neighbours"]


class Neighbours(Protocol):
    """The ranks of this host, by their place on it."""

    def expect(self, chunk: Span) -> None:
        """Get ready to receive all that they will send for it, as ``chunk.expected``; called first."""

    def give(self, chunk: Span) -> Pending:
        """Start to hand over the pieces that other places stand for, and to get those that this one does."""

    def given(self, chunk: Span, place: int, host: int) -> Tensor:
        """What a neighbour has for the owner on ``host``, FP32, once everything has arrived."""

    def means(self, chunk: Span, place: int) -> Tensor:
        """The encoded means that the ranks in one place of each host own, uint8; this rank's place: where to write."""

    def share(self, chunk: Span) -> Pending:
        """Nothing that was given is read any more: start to exchange the means of all places, if they are gathered."""


def build_neighbours(team: Team, codec: Codec, piece: int, num_slots: int) -> Neighbours:
    """The faster way that is possible; collective over the team.

    Args:
        team: of at least two ranks.
        codec: what means are encoded with.
        piece: values of a chunk for one owner, at most; in whole blocks.
        num_slots: chunks under way.
    """
    if team.grid.ranks_per_host > 1 and team.device.type == "cpu":
        memory = share_memory(team, num_slots * _slot_bytes(team, codec, piece))
        if memory is not None:
            return SharedMemory(team, codec, piece, memory)
    return Messages(team, codec)


class Messages:
    """Everything is sent."""

    def __init__(self, team: Team, codec: Codec) -> None:
        self._team = team
        self._codec = codec

    def expect(self, chunk: Span) -> None:
        """A message of each neighbour for each host, and one with its means."""
        pieces, means = [], []
        for place, peer in _others(self._team):
            for host in range(self._team.grid.num_hosts):
                pieces.append(Parcel(self.given(chunk, place, host), peer, chunk.tag(Stage.give, host)))
            if chunk.job.gathers:
                means.append(Parcel(self.means(chunk, place), peer, chunk.tag(Stage.share)))
        chunk.expected[Stage.give] = self._team.expect(pieces)
        chunk.expected[Stage.share] = self._team.expect(means)

    def give(self, chunk: Span) -> Pending:
        """A message for each neighbour and host."""
        grid = self._team.grid
        send = [
            Parcel(chunk.piece(grid.ranks[host][place]), peer, chunk.tag(Stage.give, host))
            for place, peer in _others(self._team)
            for host in range(grid.num_hosts)
        ]
        return self._team.exchange(chunk.expected[Stage.give], send)

    def given(self, chunk: Span, place: int, host: int) -> Tensor:
        """Where it arrives."""
        grid = self._team.grid
        others = place - (place > grid.place)
        start = (others * grid.num_hosts + host) * chunk.width
        return chunk.slot.host[start : start + chunk.length(grid.ranks[host][grid.place])]

    def means(self, chunk: Span, place: int) -> Tensor:
        """This rank's copy."""
        width = self._team.grid.num_hosts * self._codec.encoded_bytes(padded(self._codec, chunk.width))
        return chunk.slot.means.view(self._team.grid.ranks_per_host, -1)[place, :width]

    def share(self, chunk: Span) -> Pending:
        """A message for each neighbour."""
        tag, send = chunk.tag(Stage.share), []
        if chunk.job.gathers:
            own = self.means(chunk, self._team.grid.place)
            send = [Parcel(own, peer, tag) for _, peer in _others(self._team)]
        return self._team.exchange(chunk.expected[Stage.share], send)


class SharedMemory:
    """Everything is written once.

    What may be overwritten follows from the turns that slots take. A rank that starts chunk n has ended the chunk that
    had this slot before, and thus heard that its neighbours have read its pieces of that one. Means of n are written
    once they have all given their pieces of n; they have started it then, and read the means that were there before.

    Args:
        team: with several ranks on a host.
        codec: what means are encoded with.
        piece: values of a chunk for one owner, at most; in whole blocks.
        memory: of each place of this host, uint8, with room for all slots.
    """

    def __init__(self, team: Team, codec: Codec, piece: int, memory: Sequence[Tensor]) -> None:
        self._team = team
        self._codec = codec
        self._slots = [each.view(-1, _slot_bytes(team, codec, piece)).unbind() for each in memory]
        self._pieces_bytes = _pieces_bytes(team, piece)
        self._said, self._heard = torch.zeros(2, 1, dtype=torch.uint8).unbind()
        """What messages hold: that they come is all they say."""

    def expect(self, chunk: Span) -> None:
        """Of each neighbour a byte in each stage."""
        for stage in (Stage.give, Stage.share):
            news = [Parcel(self._heard, peer, chunk.tag(stage)) for _, peer in _others(self._team)]
            chunk.expected[stage] = self._team.expect(news)

    def give(self, chunk: Span) -> Pending:
        """Written for all neighbours."""
        grid = self._team.grid
        handed = 0
        for place, _ in _others(self._team):
            for host in range(grid.num_hosts):
                piece = chunk.piece(grid.ranks[host][place])
                self._room(chunk, grid.place, place, host, piece.numel()).copy_(piece)
                handed += piece.nbytes
        self._team.bytes_sent += handed
        return self._tell(chunk, Stage.give)

    def given(self, chunk: Span, place: int, host: int) -> Tensor:
        """Where the neighbour has written it."""
        grid = self._team.grid
        return self._room(chunk, place, grid.place, host, chunk.length(grid.ranks[host][grid.place]))

    def means(self, chunk: Span, place: int) -> Tensor:
        """Where the neighbour has them."""
        width = self._team.grid.num_hosts * self._codec.encoded_bytes(padded(self._codec, chunk.width))
        return self._slot(chunk, place)[self._pieces_bytes :][:width]

    def share(self, chunk: Span) -> Pending:
        """They are there already."""
        if chunk.job.gathers:
            own = self.means(chunk, self._team.grid.place)
            self._team.bytes_sent += own.nbytes * (self._team.grid.ranks_per_host - 1)
        return self._tell(chunk, Stage.share)

    def _slot(self, chunk: Span, place: int) -> Tensor:
        slots = self._slots[place]
        return slots[chunk.number % len(slots)]

    def _room(self, chunk: Span, writer: int, reader: int, host: int, length: int) -> Tensor:
        start = 4 * (reader * self._team.grid.num_hosts + host) * chunk.width
        return self._slot(chunk, writer)[start : start + 4 * length].view(torch.float32)

    def _tell(self, chunk: Span, stage: Stage) -> Pending:
        """Each neighbour, and hear them."""
        send = [Parcel(self._said, peer, chunk.tag(stage)) for _, peer in _others(self._team)]
        return self._team.exchange(chunk.expected[stage], send, counts=False)


def _others(team: Team) -> Iterator[tuple[int, int]]:
    """The neighbours, as (place, rank within the team)."""
    grid = team.grid
    for place, peer in enumerate(grid.ranks[grid.host]):
        if place != grid.place:
            yield place, peer


def _pieces_bytes(team: Team, piece: int) -> int:
    return 4 * team.grid.ranks_per_host * team.grid.num_hosts * piece


def _slot_bytes(team: Team, codec: Codec, piece: int) -> int:
    """Pieces for each place and host, and means of each host; in whole words of 8 bytes."""
    means = team.grid.num_hosts * codec.encoded_bytes(piece)
    return _pieces_bytes(team, piece) + -(-means // 8) * 8

"""The mean of a flat FP32 tensor over a team, encoded on the wire and summed in FP32.

Each rank owns one shard of the tensor. In pieces that travel one behind the other:

1. *within a host* (where hosts hold several ranks): pieces go in FP32 to the local rank that stands for their
   owner, so that each host speaks with one voice and only once to the network;
2. *scatter*: each piece, divided by the number of ranks, is encoded and sent to its owner, who sums in FP32;
3. *gather* (not for a reduce-scatter): the owner encodes the mean once, and every rank, itself included, reads the
   same bytes, so that all hold the same result to the last bit.

What a rank keeps for itself is not encoded in 2. Both encodings may have error feedback.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from functools import cached_property, partial
from itertools import count

import torch
from torch import Tensor

from launcher.compression.codecs import Codec
from launcher.compression.feedback import Feedback
from launcher.compression.links import Parcel, Pending, Team
from launcher.compression.pipeline import Chunk, Pipeline
from launcher.compression.reduction import Reduction
from launcher.compression.terms import StepTerms

__all__ = ["Exchange"]

_LARGEST_TAG = 1 << 30
_HOST, _SCATTER, _GATHER, _SHARE = range(4)


class _Slot:
    """The buffers of one chunk under way, for pieces of up to ``numel`` values."""

    def __init__(self, numel: int, codec: Codec, team: Team) -> None:
        grid, device = team.grid, team.device
        pieces = grid.num_hosts * codec.encoded_bytes(numel)
        self.own = torch.empty(numel, device=device)
        self.host = torch.empty((grid.ranks_per_host - 1) * grid.num_hosts * numel, device=device)
        self.sent, self.received = torch.empty(2, pieces, dtype=torch.uint8, device=device)
        self.means = torch.empty(grid.ranks_per_host * pieces, dtype=torch.uint8, device=device)


class Exchange:
    """A team and a codec: cuts reductions into chunks, which a pipeline runs.

    Args:
        team: of at least two ranks.
        codec: what crosses the network.
        chunk_elements: of the tensor, in one chunk.
        num_slots: chunks under way.
    """

    def __init__(self, team: Team, codec: Codec, chunk_elements: int, num_slots: int) -> None:
        self.team = team
        self.codec = codec
        self._piece = self._padded(max(1, chunk_elements // team.size))
        self._num_slots = num_slots
        self._numbers = count()

    @cached_property
    def pipeline(self) -> Pipeline[_Slot]:
        """The chunks' way; its buffers are made when they are first needed."""
        return Pipeline(_Slot(self._piece, self.codec, self.team) for _ in range(self._num_slots))

    @cached_property
    def _workspace(self) -> Tensor:
        return torch.empty(2, self._piece, device=self.team.device)

    def shard_size(self, numel: int) -> int:
        """Elements that each rank owns of ``numel``, in whole blocks."""
        return self._padded(-(-numel // self.team.size))

    def chunks(self, reduction: Reduction) -> Iterator[Chunk]:
        """The chunks of a reduction, to be started in this order."""
        for first in range(0, reduction.shard, self._piece):
            last = min(first + self._piece, reduction.shard)
            yield partial(self._course, reduction, first, last, next(self._numbers))

    def _padded(self, numel: int) -> int:
        """``numel`` and what is missing to whole blocks."""
        return -(-numel // self.codec.block_size) * self.codec.block_size

    def _tag(self, number: int, stage: int, host: int = 0) -> int:
        return ((number * 4 + stage) * self.team.grid.num_hosts + host) % _LARGEST_TAG

    def _course(
        self, job: Reduction, first: int, last: int, number: int, slot: _Slot
    ) -> Generator[Pending, None, None]:
        """Positions ``first`` to ``last`` of every shard, from here to there and back."""
        grid = self.team.grid
        under_way: list[Pending] = []

        def posted(pending: Pending) -> Pending:
            under_way.append(pending)
            return pending

        if grid.ranks_per_host > 1:
            yield posted(self._send_within_host(job, first, last, number, slot))
        yield posted(self._scatter(job, first, last, number, slot))
        mean = self._sum(job, first, last, slot)
        if not job.gathers:
            job.target[first : first + mean.numel()] = mean
        else:
            yield posted(self._gather(job, first, last, number, slot))
            self._read_means(job, first, last, slot, grid.place)
            if grid.ranks_per_host > 1:
                yield posted(self._share(first, last, number, slot))
                for place in range(grid.ranks_per_host):
                    if place != grid.place:
                        self._read_means(job, first, last, slot, place)
        for pending in under_way:
            pending.release()

    def _send_within_host(self, job: Reduction, first: int, last: int, number: int, slot: _Slot) -> Pending:
        grid = self.team.grid
        send, receive = [], []
        for place, peer in enumerate(grid.ranks[grid.host]):
            if place == grid.place:
                continue
            for host in range(grid.num_hosts):
                tag = self._tag(number, _HOST, host)
                send.append(Parcel(job.piece(grid.ranks[host][place], first, last), peer, tag))
                length = job.length(grid.ranks[host][grid.place], first, last)
                receive.append(Parcel(self._from_host(slot, place, host, last - first)[:length], peer, tag))
        return self.team.exchange(receive, send)

    def _from_host(self, slot: _Slot, place: int, host: int, numel: int) -> Tensor:
        """Where the piece for ``host`` from the local rank in ``place`` arrives."""
        grid = self.team.grid
        others = place - (place > grid.place)
        return slot.host[: (grid.ranks_per_host - 1) * grid.num_hosts * numel].view(-1, grid.num_hosts, numel)[
            others, host
        ]

    def _scatter(self, job: Reduction, first: int, last: int, number: int, slot: _Slot) -> Pending:
        """Encode what each host's owner is to have, this host's ranks summed."""
        grid = self.team.grid
        values, _ = self._workspace
        send, receive = [], []
        for host in range(grid.num_hosts):
            owner = grid.ranks[host][grid.place]
            length = job.length(owner, first, last)
            padded = self._padded(length)
            ours = values[:padded]
            if grid.ranks_per_host == 1:
                torch.mul(job.piece(owner, first, last), 1.0 / self.team.size, out=ours[:length])
            else:
                for place in range(grid.ranks_per_host):
                    own = place == grid.place
                    piece = (
                        job.piece(owner, first, last)
                        if own
                        else self._from_host(slot, place, host, last - first)[:length]
                    )
                    ours[:length].copy_(piece) if place == 0 else ours[:length].add_(piece)
                ours[:length].mul_(1.0 / self.team.size)
            ours[length:].zero_()
            if host == grid.host:
                slot.own[:padded].copy_(ours)
                continue
            encoded = self._piece_of(slot.sent, host, padded, last - first)
            self._encode(ours, encoded, length, job.scattered, host * job.shard + first, job.terms)
            send.append(Parcel(encoded, owner, self._tag(number, _SCATTER)))
            expected = self._padded(job.length(self.team.rank, first, last))
            arriving = self._piece_of(slot.received, host, expected, last - first)
            receive.append(Parcel(arriving, owner, self._tag(number, _SCATTER)))
        return self.team.exchange(receive, send)

    def _piece_of(self, buffer: Tensor, index: int, padded: int, numel: int) -> Tensor:
        """The encoded piece of ``padded`` values in a row of a buffer with rows for ``numel`` values."""
        start = index * self.codec.encoded_bytes(self._padded(numel))
        return buffer[start : start + self.codec.encoded_bytes(padded)]

    def _sum(self, job: Reduction, first: int, last: int, slot: _Slot) -> Tensor:
        """The mean of this rank's own positions: FP32, in the order of the hosts."""
        grid = self.team.grid
        length = job.length(self.team.rank, first, last)
        padded = self._padded(length)
        mean = self._workspace[0][:padded].zero_()
        for host in range(grid.num_hosts):
            if host == grid.host:
                mean.add_(slot.own[:padded])
            elif padded:
                self.codec.add_decoded(self._piece_of(slot.received, host, padded, last - first), mean)
        return mean[:length]

    def _gather(self, job: Reduction, first: int, last: int, number: int, slot: _Slot) -> Pending:
        """Encode the mean that ``_sum`` has left in the workspace, for all hosts."""
        grid = self.team.grid
        length = job.length(self.team.rank, first, last)
        padded = self._padded(length)
        encoded = self._mean(job, slot, grid.host, grid.place, first, last)
        self._encode(self._workspace[0][:padded], encoded, length, job.gathered, first, job.terms)
        send, receive = [], []
        for host in range(grid.num_hosts):
            if host != grid.host:
                tag = self._tag(number, _GATHER)
                send.append(Parcel(encoded, grid.ranks[host][grid.place], tag))
                arriving = self._mean(job, slot, host, grid.place, first, last)
                receive.append(Parcel(arriving, grid.ranks[host][grid.place], tag))
        return self.team.exchange(receive, send)

    def _share(self, first: int, last: int, number: int, slot: _Slot) -> Pending:
        """Hand all means of this rank's place to the host's other ranks."""
        grid = self.team.grid
        rows = slot.means.view(grid.ranks_per_host, -1)[
            :, : grid.num_hosts * self.codec.encoded_bytes(self._padded(last - first))
        ]
        tag = self._tag(number, _SHARE)
        peers = [(place, peer) for place, peer in enumerate(grid.ranks[grid.host]) if place != grid.place]
        send = [Parcel(rows[grid.place], peer, tag) for _, peer in peers]
        return self.team.exchange([Parcel(rows[place], peer, tag) for place, peer in peers], send)

    def _mean(self, job: Reduction, slot: _Slot, host: int, place: int, first: int, last: int) -> Tensor:
        """The encoded mean of what one rank owns."""
        grid = self.team.grid
        row = slot.means.view(grid.ranks_per_host, -1)[place]
        return self._piece_of(row, host, self._padded(job.length(grid.ranks[host][place], first, last)), last - first)

    def _read_means(self, job: Reduction, first: int, last: int, slot: _Slot, place: int) -> None:
        """Write the means that the ranks in one place of each host own to the target."""
        grid = self.team.grid
        for host in range(grid.num_hosts):
            owner = grid.ranks[host][place]
            length = job.length(owner, first, last)
            if not length:
                continue
            encoded = self._mean(job, slot, host, place, first, last)
            start = owner * job.shard + first
            padded = self._padded(length)
            if padded == length:
                self.codec.decode(encoded, job.target[start : start + length])
            else:
                whole = self._workspace[1][:padded]
                self.codec.decode(encoded, whole)
                job.target[start : start + length] = whole[:length]

    def _encode(
        self, values: Tensor, out: Tensor, length: int, feedback: Feedback | None, offset: int, terms: StepTerms
    ) -> None:
        """Encode ``values`` with the errors kept from before; keep what is lost now."""
        if not length:
            return
        if feedback is not None:
            feedback.add_to(values[:length], offset, terms.loss_scale)
        self.codec.encode(values, out)
        if feedback is None and not terms.measures:
            return
        lost = self._workspace[1][: values.numel()]
        self.codec.decode(out, lost)
        torch.sub(values, lost, out=lost)
        terms.measure(values, lost)
        if feedback is not None:
            feedback.keep(lost[:length], offset, terms.inverse_loss_scale)

"""The mean of a flat FP32 tensor over a team, encoded on the wire and summed in FP32.

Each rank owns one shard of the tensor. In pieces that travel one behind the other:

1. *give* (where hosts hold several ranks, equally many): neighbours hand pieces in FP32 to the one that stands for
   their owner, so that each host speaks with one voice and only once to the network;
2. *scatter*: each piece, divided by the number of ranks, is encoded and sent to its owner, who sums in FP32;
3. *gather* (not for a reduce-scatter): the owner encodes the mean once, and every rank, itself included, reads the
   same bytes, so that all hold the same result to the last bit;
4. *share* (where hosts hold several ranks): neighbours hand each other the encoded means that they have gathered, if
   any, and tell by it that they have read what they were given.

What a rank keeps for itself is not encoded in 2. Both encodings may have error feedback. Pieces are large, since each
message costs the backend a part of a millisecond; arithmetic goes through them in portions that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count

import torch
from torch import Tensor

from launcher.compression.codecs import Codec, padded
from launcher.compression.feedback import Feedback
from launcher.compression.links import Parcel, Pending, Team
from launcher.compression.neighbours import build_neighbours
from launcher.compression.pipeline import Chunk, Course, Pipeline
from launcher.compression.reduction import Reduction
from launcher.compression.span import Buffers, Span, Stage
from launcher.compression.terms import StepTerms

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
    """Of a chunk that the backend sums, encoded."""


class Exchange:
    """A team and a codec: cuts reductions into chunks, which a pipeline runs.

    Args:
        team: of at least two ranks.
        codec: what crosses the network.
        sizes: of messages and portions.
    """

    def __init__(self, team: Team, codec: Codec, sizes: Sizes) -> None:
        self.team = team
        self.codec = codec
        block = codec.block_size
        self._portion = padded(codec, sizes.portion)
        self._piece = max(sizes.message_bytes // codec.encoded_bytes(block), 1) * block
        self._num_slots = sizes.num_slots
        self._widest = 0
        self._numbers = count()
        self._neighbours = build_neighbours(team, codec, self._piece, sizes.num_slots)

    @cached_property
    def pipeline(self) -> Pipeline[Buffers]:
        """The chunks' way; its buffers are made when they are first needed, and as large as any tensor has needed."""
        slots = (Buffers(self.codec, self.team) for _ in range(self._num_slots))
        waits_aside, one_by_one = self.team.device.type != "cuda", self.team.grid.ranks_per_host > 1
        return Pipeline(slots, waits_aside, one_by_one)

    @cached_property
    def _workspace(self) -> Tensor:
        return torch.empty(2, min(self._portion, self._piece), device=self.team.device)

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

    def _portions(self, length: int) -> Iterator[tuple[int, int]]:
        """``length`` values in portions, as (first, last)."""
        step = self._workspace.shape[1]
        for first in range(0, length, step):
            yield first, min(first + step, length)

    def _encoded(self, buffer: Tensor, first: int, last: int) -> Tensor:
        """The portion ``first`` to ``last`` of an encoded piece."""
        start = self.codec.encoded_bytes(first)
        return buffer[start : start + self.codec.encoded_bytes(padded(self.codec, last - first))]

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
        yield posted(self._scatter(chunk))
        if job.gathers:
            yield posted(self._gather(chunk))
            shared = posted(self._neighbours.share(chunk))
            self._read_means(chunk, grid.place)
        else:
            for first, last, mean in self._means(chunk, feedback=None):
                job.target[chunk.first + first : chunk.first + last] = mean[: last - first]
            shared = posted(self._neighbours.share(chunk))
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
        """Encode what each host's owner is to have, this host's ranks summed."""
        job, tag, send = chunk.job, chunk.tag(Stage.scatter), []
        for host, owner in self._peers:
            length = chunk.length(owner)
            encoded = self._row(chunk.slot.sent, host, chunk.width, length)
            for first, last in self._portions(length):
                place_of_errors = host * job.shard + chunk.first + first
                values = self._add_up(chunk, host, first, last, job.scattered, place_of_errors)
                out = self._encoded(encoded, first, last)
                self._encode(values, out, last - first, job.scattered, place_of_errors, job.terms)
            send.append(Parcel(encoded, owner, tag))
        return self.team.exchange(chunk.expected[Stage.scatter], send)

    def _add_up(
        self, chunk: Span, host: int, first: int, last: int, feedback: Feedback | None, place_of_errors: int
    ) -> Tensor:
        """What this host's ranks have for the owner on ``host``, divided by the number of ranks, and errors of before.

        Returns whole blocks.
        """
        grid, each = self.team.grid, 1.0 / self.team.size
        values = self._workspace[0][: padded(self.codec, last - first)]
        out = values[: last - first]
        total = None if feedback is None else feedback.carried(place_of_errors, out, chunk.job.terms)
        for place in range(grid.ranks_per_host):
            own = place == grid.place
            piece = chunk.piece(grid.ranks[host][place]) if own else self._neighbours.given(chunk, place, host)
            if total is None:
                torch.mul(piece[first:last], each, out=out)
            else:
                torch.add(total, piece[first:last], alpha=each, out=out)
            total = out
        values[last - first :].zero_()
        return values

    def _means(self, chunk: Span, feedback: Feedback | None) -> Iterator[tuple[int, int, Tensor]]:
        """This rank's positions ``first`` to ``last``, and their means with errors of before: FP32, whole blocks."""
        grid = self.team.grid
        length = chunk.length(self.team.rank)
        rows = [self._row(chunk.slot.received, host, chunk.width, length) for host, _ in self._peers]
        for first, last in self._portions(length):
            mean = self._add_up(chunk, grid.host, first, last, feedback, chunk.first + first)
            for row in rows:
                self.codec.add_decoded(self._encoded(row, first, last), mean)
            yield first, last, mean

    def _gather(self, chunk: Span) -> Pending:
        """Encode the means for all hosts."""
        grid, job = self.team.grid, chunk.job
        encoded = self._mean(chunk, grid.host, grid.place)
        for first, last, mean in self._means(chunk, job.gathered):
            out = self._encoded(encoded, first, last)
            self._encode(mean, out, last - first, job.gathered, chunk.first + first, job.terms)
        tag = chunk.tag(Stage.gather)
        send = [Parcel(encoded, peer, tag) for _, peer in self._peers]
        return self.team.exchange(chunk.expected[Stage.gather], send)

    def _mean(self, chunk: Span, host: int, place: int) -> Tensor:
        """The encoded mean of what one rank owns."""
        grid = self.team.grid
        return self._row(self._neighbours.means(chunk, place), host, chunk.width, chunk.length(grid.ranks[host][place]))

    def _read_means(self, chunk: Span, place: int) -> None:
        """Write the means that the ranks in one place of each host own to the target."""
        grid, job = self.team.grid, chunk.job
        for host in range(grid.num_hosts):
            owner = grid.ranks[host][place]
            encoded = self._mean(chunk, host, place)
            start = owner * job.shard + chunk.first
            for first, last in self._portions(chunk.length(owner)):
                target, portion = job.target[start + first : start + last], self._encoded(encoded, first, last)
                numel = padded(self.codec, last - first)
                whole = target if numel == last - first else self._workspace[1][:numel]
                self.codec.decode(portion, whole)
                if whole is not target:
                    target.copy_(whole[: last - first])
                if job.terms.looks:
                    job.terms.look(self.codec.witness(portion, whole))

    def _encode(
        self, values: Tensor, out: Tensor, length: int, feedback: Feedback | None, offset: int, terms: StepTerms
    ) -> None:
        """Encode ``values``; keep what is lost."""
        if feedback is None and not terms.measures:
            self.codec.encode(values, out)
            return
        lost = self._workspace[1][: values.numel()]
        if feedback is not None and terms.is_unscaled and length == values.numel():
            lost = feedback.room(offset, length)
        self.codec.encode(values, out, lost)
        terms.measure(values, lost)
        if feedback is not None:
            feedback.keep(lost[:length], offset, terms, self.codec.witness(out, lost) if terms.looks else None)

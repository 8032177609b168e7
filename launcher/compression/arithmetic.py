"""What is done with a chunk's values between messages: added up, encoded, decoded, their errors kept.

Pieces are large, since each message costs the backend a part of a millisecond; arithmetic goes through them in
portions that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from launcher.compression.codecs import Codec, padded
from launcher.compression.feedback import Feedback
from launcher.compression.links import Team
from launcher.compression.neighbours import Neighbours
from launcher.compression.span import Span
from launcher.compression.terms import StepTerms

__all__ = ["Arithmetic"]


class Arithmetic:
    """Of one rank.

    Args:
        team: its team.
        codec: how values are encoded.
        neighbours: from whom this host's other ranks' pieces come.
        portion: values that are encoded or decoded at once, at most; in whole blocks.
    """

    def __init__(self, team: Team, codec: Codec, neighbours: Neighbours, portion: int) -> None:
        self._team = team
        self._codec = codec
        self._neighbours = neighbours
        self._portion = portion

    @cached_property
    def _workspace(self) -> Tensor:
        return torch.empty(2, self._portion, device=self._team.device)

    def encode_pieces(self, chunk: Span, host: int, out: Tensor, feedback: Feedback | None) -> None:
        """Encode what this host's ranks have for the owner on ``host``, in this rank's place, summed.

        Args:
            chunk: whose pieces have been given.
            host: by number.
            out: uint8, as long as what is encoded.
            feedback: errors of what is sent to owners, if they are kept.
        """
        job = chunk.job
        owner = self._team.grid.ranks[host][self._team.grid.place]
        for first, last in self._portions(chunk.length(owner)):
            place_of_errors = host * job.shard + chunk.first + first
            values = self._add_up(chunk, host, first, last, feedback, place_of_errors)
            self._encode(values, self._encoded(out, first, last), last - first, feedback, place_of_errors, job.terms)

    def encode_means(self, chunk: Span, received: Sequence[Tensor], out: Tensor) -> None:
        """Encode the means of what this rank owns.

        Args:
            chunk: whose pieces have arrived.
            received: of each other host, encoded.
            out: uint8, as long as what is encoded.
        """
        job = chunk.job
        for first, last, mean in self._means(chunk, received, job.gathered):
            encoded = self._encoded(out, first, last)
            self._encode(mean, encoded, last - first, job.gathered, chunk.first + first, job.terms)

    def write_means(self, chunk: Span, received: Sequence[Tensor]) -> None:
        """Write the means of what this rank owns to the target, which is its shard; see ``encode_means``."""
        for first, last, mean in self._means(chunk, received, feedback=None):
            chunk.job.target[chunk.first + first : chunk.first + last] = mean[: last - first]

    def read_means(self, chunk: Span, owner: int, encoded: Tensor) -> None:
        """Write the means that a rank owns to the target, which is whole."""
        job = chunk.job
        start = owner * job.shard + chunk.first
        for first, last in self._portions(chunk.length(owner)):
            target, portion = job.target[start + first : start + last], self._encoded(encoded, first, last)
            numel = padded(self._codec, last - first)
            whole = target if numel == last - first else self._workspace[1][:numel]
            self._codec.decode(portion, whole)
            if whole is not target:
                target.copy_(whole[: last - first])
            if job.terms.looks:
                job.terms.look(self._codec.witness(portion, whole))

    def _portions(self, length: int) -> Iterator[tuple[int, int]]:
        """``length`` values in portions, as (first, last)."""
        for first in range(0, length, self._portion):
            yield first, min(first + self._portion, length)

    def _encoded(self, piece: Tensor, first: int, last: int) -> Tensor:
        """The portion ``first`` to ``last`` of an encoded piece."""
        start = self._codec.encoded_bytes(first)
        return piece[start : start + self._codec.encoded_bytes(padded(self._codec, last - first))]

    def _add_up(
        self, chunk: Span, host: int, first: int, last: int, feedback: Feedback | None, place_of_errors: int
    ) -> Tensor:
        """What this host's ranks have for the owner on ``host``, divided by the number of ranks, and errors of before.

        Returns whole blocks.
        """
        grid, each = self._team.grid, 1.0 / self._team.size
        values = self._workspace[0][: padded(self._codec, last - first)]
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

    def _means(
        self, chunk: Span, received: Sequence[Tensor], feedback: Feedback | None
    ) -> Iterator[tuple[int, int, Tensor]]:
        """This rank's positions ``first`` to ``last``, and their means with errors of before: FP32, whole blocks."""
        for first, last in self._portions(chunk.length(self._team.rank)):
            mean = self._add_up(chunk, self._team.grid.host, first, last, feedback, chunk.first + first)
            for piece in received:
                self._codec.add_decoded(self._encoded(piece, first, last), mean)
            yield first, last, mean

    def _encode(
        self, values: Tensor, out: Tensor, length: int, feedback: Feedback | None, offset: int, terms: StepTerms
    ) -> None:
        """Encode ``values``; keep what is lost."""
        if feedback is None and not terms.measures:
            self._codec.encode(values, out)
            return
        lost = self._workspace[1][: values.numel()]
        if feedback is not None and terms.is_unscaled and length == values.numel():
            lost = feedback.room(offset, length)
        self._codec.encode(values, out, lost)
        terms.measure(values, lost)
        if feedback is not None:
            feedback.keep(lost[:length], offset, terms, self._codec.witness(out, lost) if terms.looks else None)

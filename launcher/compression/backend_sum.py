"""16 bits that the backend itself sums over all ranks, in 16 bits: its own collectives, in chunks one behind the other.

With several ranks on each host gloo sums over hosts only; that is ``Exchange``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial

import torch
from torch import Tensor

from launcher.compression.codecs import Half
from launcher.compression.exchange import Sizes
from launcher.compression.links import Team
from launcher.compression.pipeline import Chunk, Course, Pipeline
from launcher.compression.reduction import Reduction
from launcher.compression.terms import StepTerms

__all__ = ["BackendSum"]


class BackendSum:
    """Divides before the cast, so that no value overflows that its mean would not; a sum still can.

    Args:
        team: of at least two ranks.
        codec: float16 or bfloat16.
        sizes: of chunks.
    """

    def __init__(self, team: Team, codec: Half, sizes: Sizes) -> None:
        self.team = team
        self._codec = codec
        self._piece = -(-sizes.sum_bytes // (codec.encoded_bytes(1) * team.size))
        self._num_slots = sizes.num_slots

    @cached_property
    def pipeline(self) -> Pipeline[Tensor]:
        """The chunks' way."""
        numel = self._piece * (self.team.size + 1)
        dtype, device = self._codec.dtype, self.team.device
        slots = (torch.empty(numel, dtype=dtype, device=device) for _ in range(self._num_slots))
        return Pipeline(slots, waits_aside=device.type != "cuda")

    @cached_property
    def _workspace(self) -> Tensor:
        return torch.empty(self._piece * self.team.size, device=self.team.device)

    def chunks(self, job: Reduction) -> Iterator[Chunk]:
        """The chunks of a reduction, to be started in this order."""
        if job.gathers:
            each = self._piece * self.team.size
            for first in range(0, job.source.numel(), each):
                last = min(first + each, job.source.numel())
                yield partial(self._reduce, job.source[first:last], job.target[first:last], job.terms)
            return
        shards = job.source.view(self.team.size, job.shard)
        for first in range(0, job.shard, self._piece):
            last = min(first + self._piece, job.shard)
            yield partial(self._reduce_scatter, shards[:, first:last], job.target[first:last], job.terms)

    def _reduce(self, source: Tensor, target: Tensor, terms: StepTerms, slot: Tensor) -> Course:
        encoded = slot[: source.numel()]
        self._encode(source, encoded, terms)
        yield self.team.all_reduce(encoded)
        target.copy_(encoded)
        return ()

    def _reduce_scatter(self, source: Tensor, target: Tensor, terms: StepTerms, slot: Tensor) -> Course:
        """``source``: (size, p), rows of which each rank gets the mean of its own."""
        encoded = slot[: source.numel()]
        mean = slot[source.numel() :][: target.numel()]
        self._encode(source, encoded, terms)
        yield self.team.reduce_scatter(mean, encoded)
        target.copy_(mean)
        return ()

    def _encode(self, source: Tensor, out: Tensor, terms: StepTerms) -> None:
        values = self._workspace[: source.numel()]
        torch.mul(source, 1.0 / self.team.size, out=values.view(source.shape))
        out.copy_(values)
        if terms.measures:
            terms.measure(values, values - out)

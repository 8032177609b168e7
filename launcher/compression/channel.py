"""One axis of ranks, and how flat gradients are averaged along it: the team, the codec, the errors kept."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from launcher.compression.backend_sum import BackendSum
from launcher.compression.codecs import BlockInt8, Half
from launcher.compression.exchange import Exchange, Sizes
from launcher.compression.feedback import Feedback
from launcher.compression.layout import Layout, Slice
from launcher.compression.links import Team
from launcher.compression.memory import Memories, Memory
from launcher.compression.pipeline import Chunk, Pipeline
from launcher.compression.reduction import Reduction
from launcher.compression.wire import Residue, Wire
from launcher.config.schema import Accumulate, Codec, CompressionConfig

__all__ = ["Channel"]

_SIZES = {
    "cpu": Sizes(message_bytes=3 << 17, portion=1 << 17, num_slots=5, sum_bytes=1 << 20),
    "cuda": Sizes(message_bytes=1 << 23, portion=1 << 23, num_slots=2, sum_bytes=1 << 23),
}
"""On GPUs a launch must be worth its while, and there is no cache to stay in. On CPUs more bytes under way only fill
TCP's queues: messages twice as large left the link idle at a step's beginning, those of two thirds cost too much."""


class Channel:
    """Averages flat tensors over a team; all its ranks call in the same order.

    Args:
        team: of at least two ranks.
        config: a codec of 16 or 8 bits.
        wire: counts, and keeps the errors.
        axis: a name for the team's place in the whole, such as "replica".
        weight: what a mean over this team counts in the mean over all ranks: 1 / its replicas.
        scatters: whether it is for shards of means alone.
    """

    def __init__(
        self,
        team: Team,
        config: CompressionConfig,
        wire: Wire,
        axis: str,
        weight: float = 1.0,
        scatters: bool = False,
    ) -> None:
        self.team = team
        self.wire = wire
        self._axis = axis
        self._weight = weight
        self._keeps_errors = config.error_feedback
        wire.keeps_errors |= config.error_feedback
        self._memories: dict[Hashable, Memories] = {}
        sizes = _SIZES[team.device.type]
        codec = _codec(config)
        self._backend: BackendSum | None = None
        sums_over_hosts = None
        if config.accumulate is Accumulate.wire and isinstance(codec, Half):
            if team.device.type == "cuda" or team.grid.ranks_per_host == 1:  # NCCL knows by itself who is near
                self._backend = BackendSum(team, codec, sizes)
            elif not scatters:
                sums_over_hosts = codec.dtype
        self._exchange = Exchange(team, codec, sizes, sums_over_hosts)
        wire.counters.append(team)

    @property
    def pipeline(self) -> Pipeline[Any]:
        """What runs the chunks of means over whole tensors."""
        return (self._backend or self._exchange).pipeline

    def prepare(self, key: Hashable, layout: Layout, gathers: bool) -> None:
        """Get ready for a flat tensor before it first crosses, or for one that has parameters it never had."""
        former = self._memories.get(key)
        if not self._keeps_errors or (former is not None and former.covers(layout)):
            return
        build = partial(self._build, gathers=gathers)
        memories = self._memories[key] = Memories(build(layout), build)
        if former is not None:
            memories.inherit(former)
            self.wire.forget(former.whole.feedbacks + former.passing, former.gather)
        self.wire.before_state.append(memories.gather)
        # Errors that are shared out anew go to whoever encodes the mean last.
        is_last = not gathers and self._weight == 1.0
        share = 1.0 / (self.team.grid.num_hosts - 1) if is_last else 0.0
        whole = memories.whole
        self.wire.residues.append(Residue(f"{self._axis}.scattered", whole.scattered, whole.sent, self._weight, share))
        if whole.gathered is not None:
            self.wire.residues.append(Residue(f"{self._axis}.gathered", whole.gathered, whole.owned, self._weight, 1.0))

    def mean(self, key: Hashable, flat: Tensor, layout: Layout | None) -> Iterator[Chunk]:
        """The chunks that replace ``flat``, FP32 (n,), by the team's mean.

        Args:
            key: tells the tensor from others of a step.
            flat: contiguous.
            layout: what is in it; None where that is not known, and no errors are kept.
        """
        shard = self._exchange.shard_size(flat.numel())
        memory = self._memory(key, layout, gathers=True)
        return (self._backend or self._exchange).chunks(self._reduction(memory, flat, flat, shard, gathers=True))

    def run_mean(self, key: Hashable, flat: Tensor, layout: Layout | None) -> None:
        """``mean``, here and now (on CUDA: enqueued on the current stream)."""
        self.pipeline.run(self.mean(key, flat, layout))

    def run_shard_mean(self, key: Hashable, source: Tensor, target: Tensor, layout: Layout | None) -> None:
        """Write this rank's shard of the team's mean to ``target``, here and now (on CUDA: on the current stream).

        Args:
            key: tells the tensor from others of a step.
            source: FP32 (size · s,), in the order of the team's ranks.
            target: FP32 (s,).
            layout: of ``source``.
        """
        memory = self._memory(key, layout, gathers=False)
        job = self._reduction(memory, source, target, target.numel(), gathers=False)
        # gloo's own reduce-scatter sends everything twice.
        reducer = self._backend if self._backend is not None and source.is_cuda else self._exchange
        reducer.pipeline.run(reducer.chunks(job))

    def stay(self, key: Hashable, names: frozenset[str]) -> None:
        """These parameters' last means are nobody's: their errors stay what they were."""
        if self._keeps_errors:
            self._memories[key].whole.stay(names)

    def _memory(self, key: Hashable, layout: Layout | None, gathers: bool) -> Memory | None:
        if layout is None or not self._keeps_errors:
            return None
        former = self._memories.get(key)
        if former is not None and former.active.layout == layout:
            return former.active
        self.prepare(key, layout, gathers)
        memories = self._memories[key]
        known = len(memories.passing)
        memory = memories.take(layout)
        self.wire.passing += memories.passing[known:]
        return memory

    def _reduction(self, memory: Memory | None, source: Tensor, target: Tensor, shard: int, gathers: bool) -> Reduction:
        scattered, gathered = (memory.scattered, memory.gathered) if memory is not None else (None, None)
        return Reduction(source, target, shard, gathers, self.wire.terms, scattered, gathered)

    def _build(self, layout: Layout, gathers: bool) -> Memory:
        """A memory without errors."""
        grid, device = self.team.grid, self.team.device
        shard = self._exchange.shard_size(layout.numel) if gathers else layout.numel // self.team.size
        scattered = Feedback(grid.num_hosts * shard, device)
        sent: list[Slice] = []
        for host in range(grid.num_hosts):
            owner = grid.ranks[host][grid.place]
            if host != grid.host:
                parts = layout.within(owner * shard, shard)
                sent += [Slice(host * shard + part.offset, part.name, part.start, part.length) for part in parts]
        if not gathers:
            return Memory(layout, scattered, tuple(sent))
        owned = tuple(layout.within(self.team.rank * shard, shard))
        return Memory(layout, scattered, tuple(sent), Feedback(shard, device), owned)


def _codec(config: CompressionConfig) -> Half | BlockInt8:
    if config.codec is Codec.int8:
        return BlockInt8(config.block_size)
    assert config.codec in (Codec.fp16, Codec.bf16), config.codec
    return Half(torch.float16 if config.codec is Codec.fp16 else torch.bfloat16)

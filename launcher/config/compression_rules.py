"""What can go with which codec: for configurations, and for whoever attaches one to a model of their own."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.config.bounds import at_least
from launcher.config.schema import Accumulate, Axis, Codec, CompressionConfig, Strategy

__all__ = ["compression_problems"]

_LARGEST_BLOCK = 65536


def compression_problems(compression: CompressionConfig, strategy: Strategy) -> Iterator[str]:
    """What is wrong with a codec for models that are laid out like this."""
    codec = compression.codec
    sharded = strategy in (Strategy.zero2, Strategy.fsdp)
    if codec is Codec.powersgd and sharded:
        yield (
            f"compression=powersgd with parallel={strategy.value}: PowerSGD approximates whole gradient matrices that "
            "every rank is to have, but here each rank is to have only rows of them. "
            "Use compression=int8, fp16 or bf16, or parallel=ddp or hsdp."
        )
    if compression.axis is Axis.replica and sharded and codec is not Codec.none:
        yield (
            f"compression.axis=replica with parallel={strategy.value}: there is one replica, so nothing would be "
            "compressed. Use compression.axis=all, or parallel=hsdp."
        )
    if compression.axis is Axis.all and codec is Codec.powersgd and strategy is Strategy.hsdp:
        yield (
            "compression.axis=all with compression=powersgd: PowerSGD cannot shard what it reduces. "
            "Use compression.axis=replica."
        )
    sums_on_wire = compression.accumulate is Accumulate.wire and codec in (Codec.fp16, Codec.bf16)
    if sums_on_wire and compression.error_feedback:
        yield (
            "compression.error_feedback=true with compression.accumulate=wire: what the backend loses in its sum is "
            "not known. Use compression.accumulate=fp32, or compression.error_feedback=false."
        )
    if codec is Codec.int8 and (not 4 <= compression.block_size <= _LARGEST_BLOCK or compression.block_size % 4):
        yield (
            f"compression.block_size={compression.block_size} must be a multiple of 4 from 4 to {_LARGEST_BLOCK}, such "
            "as 128: a block's scale lies behind its values, on a 4-byte boundary, and one for very many says little."
        )
    yield from at_least("compression.rank", compression.rank, 1)
    yield from at_least("compression.start_step", compression.start_step, 2)

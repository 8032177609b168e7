"""The arithmetic of one reduction over any number of ranks, in this process: the real codecs, no communication."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from launcher.compression.codecs import Codec

__all__ = ["exchanged_mean", "hook_ring_mean", "ring_mean", "tree_mean"]

Values = Callable[[int], Tensor]
"""The gradient of a rank, FP32 (n,)."""


def exchanged_mean(codec: Codec, values: Values, num_ranks: int) -> Tensor:
    """``accumulate=fp32`` and ``int8`` on hosts of one rank: what rank 0 owns, as every rank reads it, FP32 (n,)."""
    mean = values(0) / num_ranks
    encoded = torch.empty(codec.encoded_bytes(mean.numel()), dtype=torch.uint8)
    for rank in range(1, num_ranks):
        codec.encode(values(rank) * (1.0 / num_ranks), encoded)
        codec.add_decoded(encoded, mean)
    codec.encode(mean, encoded)
    codec.decode(encoded, mean)
    return mean


def ring_mean(dtype: torch.dtype, values: Values, num_ranks: int) -> Tensor:
    """``accumulate=wire`` where the backend sums along a ring, as gloo does and NCCL may: rounded after each rank."""
    total = _divided(dtype, values, num_ranks, 0)
    for rank in range(1, num_ranks):
        # FP32 holds the sum of two 16-bit numbers to well below their last bit: rounding it is their own addition.
        total = (total.float() + _divided(dtype, values, num_ranks, rank).float()).to(dtype)
    return total.float()


def tree_mean(dtype: torch.dtype, values: Values, num_ranks: int) -> Tensor:
    """``accumulate=wire`` where the backend sums in pairs, and pairs of pairs, as NCCL may."""

    def total(first: int, last: int) -> Tensor:
        if last - first == 1:
            return _divided(dtype, values, num_ranks, first)
        middle = (first + last) // 2
        return (total(first, middle).float() + total(middle, last).float()).to(dtype)

    return total(0, num_ranks).float()


def hook_ring_mean(dtype: torch.dtype, values: Values, num_ranks: int) -> Tensor:
    """torch's fp16_compress_hook: it casts, and divides what it has cast."""
    total = (values(0).to(dtype) / num_ranks).float()
    for rank in range(1, num_ranks):
        total = (total + (values(rank).to(dtype) / num_ranks).float()).to(dtype).float()
    return total


def _divided(dtype: torch.dtype, values: Values, num_ranks: int, rank: int) -> Tensor:
    return (values(rank) * (1.0 / num_ranks)).to(dtype)

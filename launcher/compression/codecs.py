"""How a piece of FP32 gradients is written for the wire, and read back: arithmetic alone, no communication.

A codec encodes ``n`` FP32 values into ``encoded_bytes(n)`` bytes; ``n`` is a multiple of its ``block_size``. What is
not finite stays so: an infinite or undefined value comes back as one (``int8``: with all of its block), so that
the step's overflow flag still sees it. Results are written where the caller says; a codec allocates nothing
after its first use.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["BlockInt8", "Codec", "Half", "padded"]

_LARGEST = 127.0
_TINY = 1e-30
"""The smallest maximum of a block that is told from zero; its reciprocal times 127 is still finite in FP32."""


class Codec(Protocol):
    """A way to write FP32 values in fewer bytes."""

    block_size: int
    """Values are encoded in multiples of this."""

    def encoded_bytes(self, numel: int) -> int:
        """The size of ``numel`` values on the wire."""

    def encode(self, values: Tensor, out: Tensor, lost: Tensor | None = None) -> None:
        """Write ``values``, FP32 (n,), to ``out``, uint8 (encoded_bytes(n),); what is lost to ``lost``, FP32 (n,)."""

    def decode(self, encoded: Tensor, out: Tensor) -> None:
        """Read ``encoded``, uint8 (encoded_bytes(n),), into ``out``, FP32 (n,)."""

    def add_decoded(self, encoded: Tensor, total: Tensor) -> None:
        """Add what is read from ``encoded`` to ``total``, FP32 (n,)."""

    def witness(self, encoded: Tensor, values: Tensor) -> Tensor:
        """What is finite if and only if ``values`` are, which were decoded or lost, FP32 (n,)."""


def padded(codec: Codec, numel: int) -> int:
    """``numel`` and what is missing to whole blocks."""
    return -(-numel // codec.block_size) * codec.block_size


class Half:
    """16 bits a value: float16 or bfloat16, rounded to the nearest."""

    block_size = 2  # whole FP32 words, so that pieces stay aligned

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._work: Tensor | None = None

    def encoded_bytes(self, numel: int) -> int:
        """Two bytes a value."""
        return 2 * numel

    def encode(self, values: Tensor, out: Tensor, lost: Tensor | None = None) -> None:
        """A cast; beyond float16's range (65504) the result is infinite."""
        out.view(self.dtype).copy_(values)
        if lost is not None:
            self.decode(out, lost)
            torch.sub(values, lost, out=lost)

    def decode(self, encoded: Tensor, out: Tensor) -> None:
        """An exact cast."""
        out.copy_(encoded.view(self.dtype))

    def add_decoded(self, encoded: Tensor, total: Tensor) -> None:
        """A sum in FP32."""
        halves = encoded.view(self.dtype)
        if not total.is_cpu:
            total.add_(halves)
            return
        # On CPUs a sum of two types makes a tensor.
        if self._work is None or self._work.numel() < total.numel():
            self._work = torch.empty_like(total)
        total.add_(self._work[: total.numel()].copy_(halves))

    def witness(self, encoded: Tensor, values: Tensor) -> Tensor:
        """All of them; a norm of halves takes longer."""
        return values


class BlockInt8:
    """8 bits a value and one FP32 scale for each block of values: the block's largest magnitude becomes 127.

    Encoded, ``n`` values are ``n`` signed bytes followed by ``n / block_size`` FP32 scales. A value is off by at most
    half of a scale, 1/254 of its block's largest magnitude.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._workspace = _Workspace(block_size)

    def encoded_bytes(self, numel: int) -> int:
        """A byte a value, four a block."""
        return numel + 4 * (numel // self.block_size)

    def encode(self, values: Tensor, out: Tensor, lost: Tensor | None = None) -> None:
        """Scale each block and round to the nearest."""
        numel = values.numel()
        blocks = values.view(-1, self.block_size)
        scales = out[numel:].view(torch.float32)
        work = self._workspace.fit(values)
        # The magnitude of a block; both reductions hand on NaN. Cheaper than one over absolute values.
        torch.amax(blocks, dim=1, out=scales)
        torch.amin(blocks, dim=1, out=work.lowest)
        torch.maximum(scales, work.lowest.neg_(), out=scales).clamp_(min=_TINY).mul_(1.0 / _LARGEST)
        torch.reciprocal(scales, out=work.inverse)
        torch.mul(blocks, work.factors, out=work.blocks)
        # In a block that is not finite any byte may be written: its scale makes all of it non-finite.
        out[:numel].view(torch.int8).copy_(work.values.round_())
        if lost is not None:
            factors, left = scales.unsqueeze(1), lost.view(-1, self.block_size)
            torch.addcmul(blocks, work.blocks, factors, value=-1.0, out=left)

    def decode(self, encoded: Tensor, out: Tensor) -> None:
        """Each byte times its block's scale."""
        numel = out.numel()
        out.copy_(encoded[:numel].view(torch.int8))
        out.view(-1, self.block_size).mul_(encoded[numel:].view(torch.float32).unsqueeze(1))

    def add_decoded(self, encoded: Tensor, total: Tensor) -> None:
        """A sum in FP32."""
        numel, work = total.numel(), self._workspace.fit(total)
        work.values.copy_(encoded[:numel].view(torch.int8))
        scales = encoded[numel:].view(torch.float32).unsqueeze(1)
        total.view(-1, self.block_size).addcmul_(work.blocks, scales)

    def witness(self, encoded: Tensor, values: Tensor) -> Tensor:
        """The scales: one that is not finite makes all of its block so, and nothing else does."""
        return encoded[values.numel() :].view(torch.float32)


class _Workspace:
    """Room for what a piece passes through, and its views for the size that was asked for last: most have one size."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._room = torch.empty(0)
        self.values = self._room
        self.blocks = self._room
        """(number of blocks, block_size): the values."""
        self.lowest = self._room
        """(number of blocks,)"""
        self.inverse = self._room
        """(number of blocks,)"""
        self.factors = self._room
        """(number of blocks, 1): the inverses, to multiply blocks by."""

    def fit(self, values: Tensor) -> _Workspace:
        """Itself, for as many values as these, on their device."""
        numel = values.numel()
        if self.values.numel() == numel and self.values.device == values.device:
            return self
        num_blocks = numel // self._block_size
        last = numel + num_blocks
        if self._room.numel() < last + num_blocks or self._room.device != values.device:
            self._room = values.new_empty(last + num_blocks, dtype=torch.float32)
        self.blocks = self._room[:numel].view(-1, self._block_size)
        self.values, self.lowest = self._room[:numel], self._room[numel:last]
        self.inverse = self._room[last : last + num_blocks]
        self.factors = self.inverse.unsqueeze(1)
        return self

"""One flat tensor that is to be reduced over a team: what comes in, what comes out, who owns which part."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from launcher.compression.feedback import Feedback
from launcher.compression.terms import StepTerms

__all__ = ["Reduction"]


@dataclass(frozen=True)
class Reduction:
    """One flat tensor to be reduced."""

    source: Tensor
    """FP32 (n,), this rank's own."""
    target: Tensor
    """FP32: (n,) for the whole mean (it may be ``source``), or (shard,) for this rank's shard of it."""
    shard: int
    """Elements that each rank owns; the last ranks' shards may reach beyond ``n``."""
    gathers: bool
    """Whether every rank gets the whole mean."""
    terms: StepTerms
    scattered: Feedback | None = None
    """(num_hosts · shard,): errors of what this rank sends to the owners."""
    gathered: Feedback | None = None
    """(shard,): errors of the mean that this rank owns."""

    def length(self, owner: int, first: int, last: int) -> int:
        """How many of the positions ``first`` to ``last`` of an owner's shard exist."""
        return max(0, min(last, self.source.numel() - owner * self.shard) - first)

    def piece(self, owner: int, first: int, last: int) -> Tensor:
        """This rank's own values there."""
        start = owner * self.shard + first
        return self.source[start : start + self.length(owner, first, last)]

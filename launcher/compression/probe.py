"""Whether this rank's own gradients were finite before they were mixed with the others'.

After the wire a non-finite gradient is everybody's. The probe reads each bucket once on its way to the wire,
while the backward pass still runs, and leaves one number on the device. A SUM over a bucket would do, but
finite values can overflow in it; a norm in FP32 can as well, only far above FP16's range.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["OverflowProbe"]


class OverflowProbe:
    """Counts the buckets of a step that held a non-finite value."""

    def __init__(self, device: torch.device) -> None:
        self._count = torch.zeros((), dtype=torch.float64, device=device)

    def take(self) -> Tensor:
        """The count since the last call, as a float64 scalar on the device."""
        count = self._count.clone()
        self._count.zero_()
        return count

    def look(self, bucket: Tensor) -> None:
        """Read a bucket."""
        if bucket.numel():
            self._count.add_(~torch.linalg.vector_norm(bucket).isfinite())

"""What is the same for all that is encoded in one step: the loss scale, and what is looked at on the way."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["StepTerms"]


class StepTerms:
    """Set by the wire before a step's first gradient crosses it.

    Args:
        device: where the gradients live.
    """

    def __init__(self, device: torch.device) -> None:
        self.loss_scale = torch.ones((), device=device)
        """FP32 scalar: what the gradients are multiplied by."""
        self.inverse_loss_scale = torch.ones((), device=device)
        # In the host's own memory, so that reading it is no operation on a device.
        self._scale_here = self.loss_scale.numpy() if device.type == "cpu" else None
        self.is_unscaled = self._scale_here is not None
        """Whether the loss scale is known to be 1 without waiting for a device."""
        self.measures = False
        """Whether this step measures what encoding loses."""
        self.lost = torch.zeros(2, dtype=torch.float64, device=device)
        """Sums of squares since they were last taken: of what was lost, of what was to be encoded."""
        self.looks = False
        """Whether results and errors are looked at as they come, for a loop that does not tell if its step counted."""
        self._norm = torch.zeros((), device=device)
        self._magnitude = torch.zeros((), device=device)

    def begin(self, loss_scale: Tensor, measures: bool) -> None:
        """A step begins."""
        self.loss_scale.copy_(loss_scale)
        torch.reciprocal(self.loss_scale, out=self.inverse_loss_scale)
        self.is_unscaled = self._scale_here is not None and float(self._scale_here) == 1.0
        self.measures = measures

    def measure(self, values: Tensor, lost: Tensor) -> None:
        """Add to the sums, if this step measures."""
        if self.measures:
            norms = torch.stack([torch.linalg.vector_norm(lost), torch.linalg.vector_norm(values)])
            self.lost += norms.double().square()

    def look(self, values: Tensor) -> None:
        """See whether a part of a result, or of what was lost, is finite; if they are looked at."""
        if self.looks:
            norm = torch.linalg.vector_norm(values, out=self._norm if values.dtype is torch.float32 else None)
            self._magnitude.add_(norm)

    def take_non_finite(self) -> Tensor:
        """Whether anything looked at since the last call was not finite, a bool scalar on the device."""
        non_finite = self._magnitude.isfinite().logical_not()
        self._magnitude.zero_()
        return non_finite

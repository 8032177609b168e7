"""What is the same for all that is encoded in one step: the loss scale, and whether errors are measured."""

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
        self.measures = False
        """Whether this step measures what encoding loses."""
        self.lost = torch.zeros(2, dtype=torch.float64, device=device)
        """Sums of squares since they were last taken: of what was lost, of what was to be encoded."""

    def begin(self, loss_scale: Tensor, measures: bool) -> None:
        """A step begins."""
        self.loss_scale.copy_(loss_scale)
        torch.reciprocal(self.loss_scale, out=self.inverse_loss_scale)
        self.measures = measures

    def measure(self, values: Tensor, lost: Tensor) -> None:
        """Add to the sums, if this step measures."""
        if self.measures:
            norms = torch.stack([torch.linalg.vector_norm(lost), torch.linalg.vector_norm(values)])
            self.lost += norms.double().square()

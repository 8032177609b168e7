"""Error feedback: what encoding has lost is kept, and added to what is encoded in the next step.

Errors are kept in units of the true gradient, without the loss scale, so that they stay right when the scale
changes. A step writes its errors beside those of the last applied step; only once it is known that the step
was applied do they take their place, so that a skipped step leaves no trace.

Seide et al., 1-Bit Stochastic Gradient Descent (2014); Karimireddy et al., arXiv:1901.09847.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Feedback"]


class Feedback:
    """The errors of one flat tensor on this rank, FP32 (numel,)."""

    def __init__(self, numel: int, device: torch.device) -> None:
        self.kept = torch.zeros(numel, device=device)
        """Of the last applied step: what the next one adds."""
        self.fresh = torch.zeros(numel, device=device)
        """Of the step under way."""
        self._written = False

    def add_to(self, values: Tensor, offset: int, loss_scale: Tensor) -> None:
        """Add the kept errors from ``offset`` on to ``values``, which carry the loss scale."""
        values.addcmul_(self.kept[offset : offset + values.numel()], loss_scale)

    def keep(self, errors: Tensor, offset: int, inverse_loss_scale: Tensor) -> None:
        """Remember this step's errors, which carry the loss scale."""
        self._written = True
        torch.mul(errors, inverse_loss_scale, out=self.fresh[offset : offset + errors.numel()])

    def is_spoilt(self) -> Tensor:
        """Whether the step under way has lost what is not finite, a bool scalar on the device."""
        if not self._written:
            return torch.zeros((), dtype=torch.bool, device=self.fresh.device)
        norm: Tensor = torch.linalg.vector_norm(self.fresh)
        return norm.isfinite().logical_not()

    def settle(self, found_inf: Tensor) -> None:
        """The step has ended: applied (0), its errors are kept; skipped (1), they are forgotten."""
        if not self._written:
            return
        self._written = False
        if found_inf.device.type == "cpu":
            if not found_inf:  # a number in the host's own memory: nothing is waited for
                self.kept, self.fresh = self.fresh, self.kept
        else:
            torch.where(found_inf > 0, self.kept, self.fresh, out=self.kept)

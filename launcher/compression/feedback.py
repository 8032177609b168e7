"""Error feedback: what encoding has lost is kept, and added to what is encoded in the next step.

Errors are kept in units of the true gradient, without the loss scale, so that they stay right when the scale
changes. A step writes its errors beside those of the last applied step; only once it is known that the step
was applied do they take their place, so that a skipped step leaves no trace.

Seide et al., 1-Bit Stochastic Gradient Descent (2014); Karimireddy et al., arXiv:1901.09847.
"""

from __future__ import annotations

import torch
from torch import Tensor

from launcher.compression.terms import StepTerms

__all__ = ["Feedback"]


class Feedback:
    """The errors of one flat tensor on this rank, FP32 (numel,)."""

    def __init__(self, numel: int, device: torch.device) -> None:
        self.kept = torch.zeros(numel, device=device)
        """Of the last applied step: what the next one adds."""
        self.fresh = torch.zeros(numel, device=device)
        """Of the step under way."""
        self._written = False

    def carried(self, offset: int, out: Tensor, terms: StepTerms) -> Tensor:
        """Kept errors from ``offset`` on, carrying the loss scale: in ``out``, FP32 (n,), or where they are kept."""
        kept = self.kept[offset : offset + out.numel()]
        return kept if terms.is_unscaled else torch.mul(kept, terms.loss_scale, out=out)

    def room(self, offset: int, length: int) -> Tensor:
        """Where this step's errors from ``offset`` on are kept."""
        return self.fresh[offset : offset + length]

    def keep(self, errors: Tensor, offset: int, terms: StepTerms, witness: Tensor | None = None) -> None:
        """Remember this step's errors.

        Args:
            errors: FP32 (n,); they carry the loss scale, and may be where they are to be kept.
            offset: of the first.
            terms: the step's.
            witness: is finite if and only if they are; None: they are looked at themselves.
        """
        room = self.room(offset, errors.numel())
        if errors.data_ptr() != room.data_ptr():
            torch.mul(errors, terms.inverse_loss_scale, out=room)
            witness = None  # what is finite may not be so in units of the true gradient
        self._written = True
        terms.look(room if witness is None else witness)  # now, while it is in the cache

    def stay(self, offset: int, length: int) -> None:
        """What this step has written there is not sent to anybody: what was kept stays."""
        self.room(offset, length).copy_(self.kept[offset : offset + length])

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

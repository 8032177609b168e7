"""A step's numbers on their way from the device to the loop, which reads them one step later."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from launcher.precision import Agreement, Gradients

__all__ = ["StepNumbers", "StepTicket"]


@dataclass(frozen=True)
class StepNumbers:
    """What the ranks agreed on in one step; the same on every rank."""

    step: int
    """Steps attempted, this one included."""
    loss: float
    """Mean over the items of the global batch."""
    grad_norm: float
    """Of the gradient of the mean loss: unscaled, before clipping."""
    loss_scale: float
    """Used in this step."""
    overflow: bool
    """Whether the step was skipped because a gradient was not finite."""
    rate_factor: float
    """What the configured learning rate was multiplied by."""
    applied_steps: int
    """Steps applied so far, this one included if it was."""
    stop: bool
    """Whether any rank has voted to stop."""
    digests: tuple[float, ...]
    """Each rank's digest of its state before the step."""
    origins: tuple[int, ...]
    """Ranks whose own gradients were not finite, before the wire; empty if nobody has looked."""


@dataclass(frozen=True)
class StepTicket:
    """Numbers that may still be computed. ``read`` waits for them, and for nothing that came later."""

    step: int
    measured: Gradients
    """Which gradients ``norms`` measures; their values are gone."""
    norms: Tensor
    """(gradients,): this rank's measure of each, on the device."""
    _host: Tensor
    _copied: torch.cuda.Event | None

    @classmethod
    def of(
        cls,
        step: int,
        gradients: Gradients,
        agreement: Agreement,
        grad_norm: Tensor,
        found_inf: Tensor,
        loss_scale: Tensor,
        rate_factor: Tensor,
        applied_steps: Tensor,
    ) -> StepTicket:
        """Pack the numbers and start their copy to pinned host memory."""
        measured = Gradients(gradients.indices, [])
        scalars = (
            agreement.loss,
            agreement.items,
            agreement.stop_votes,
            grad_norm,
            found_inf,
            loss_scale,
            rate_factor,
            applied_steps,
        )
        packed = torch.cat([torch.stack([scalar.double() for scalar in scalars]), agreement.digests, agreement.origins])
        if packed.device.type != "cuda":
            return cls(step, measured, agreement.norms, packed, None)
        host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
        host.copy_(packed, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        return cls(step, measured, agreement.norms, host, copied)

    def read(self) -> StepNumbers:
        """The step's numbers, once they have arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        loss, items, stop, grad_norm, found_inf, loss_scale, rate_factor, applied, *slots = self._host.tolist()
        digests, origins = slots[: len(slots) // 2], slots[len(slots) // 2 :]
        return StepNumbers(
            step=self.step,
            loss=loss / items if items > 0 else float("nan"),
            grad_norm=grad_norm,
            loss_scale=loss_scale,
            overflow=found_inf > 0,
            rate_factor=rate_factor,
            applied_steps=int(applied),
            stop=stop > 0,
            digests=tuple(digests),
            origins=tuple(rank for rank, count in enumerate(origins) if count),
        )

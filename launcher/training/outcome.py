"""A step's numbers on their way from the device to the loop, which reads them one step later."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from launcher.precision import Agreement, Gradients

__all__ = ["StepNumbers", "StepTicket", "Verdict"]


@dataclass(frozen=True)
class Verdict:
    """What to do with the gradients: float32 scalars on the device."""

    found_inf: Tensor
    """Exactly 1 if any gradient on any rank is not finite, else exactly 0."""
    divisor: Tensor
    """Loss scale, items and clipping in one number."""
    grad_norm: Tensor
    """Of the gradient of the mean loss: unscaled, before clipping; float64."""


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
    wire_bytes: int
    """What this rank has sent for gradients; for the backend's own collectives, what a ring sends."""
    compression_error: float | None
    """What encoding has lost on the wire, relative to what was encoded, as L2 norms over all ranks; None in steps that
    do not measure it, and where nothing is encoded."""
    origins: tuple[int, ...]
    """Ranks whose own gradients were not finite, before the wire; empty if nobody has looked."""
    save_votes: int = 0
    """Ranks whose clock says that it is time for a checkpoint."""
    done_votes: int = 0
    """Ranks whose part of the checkpoint that is being written is done."""
    failed_votes: int = 0
    """Ranks that could not write theirs."""


@dataclass(frozen=True)
class StepTicket:
    """Numbers that may still be computed. ``read`` waits for them, and for nothing that came later."""

    step: int
    measured: Gradients
    """Which gradients ``norms`` measures; their values are gone."""
    norms: Tensor
    """(gradients,): this rank's measure of each, on the device."""
    wire_bytes: int
    _host: Tensor
    _copied: torch.cuda.Event | None

    @classmethod
    def of(
        cls,
        step: int,
        gradients: Gradients,
        agreement: Agreement,
        verdict: Verdict,
        loss_scale: Tensor,
        rate_factor: Tensor,
        applied_steps: Tensor,
        wire_bytes: int,
    ) -> StepTicket:
        """Pack the numbers and start their copy to pinned host memory."""
        measured = Gradients(gradients.indices, [])
        scalars = (
            agreement.loss,
            agreement.items,
            agreement.stop_votes,
            agreement.lost,
            agreement.encoded,
            verdict.grad_norm,
            verdict.found_inf,
            loss_scale,
            rate_factor,
            applied_steps,
        )
        numbers = torch.stack([scalar.double() for scalar in scalars])
        packed = torch.cat([numbers, agreement.checkpoint_votes, agreement.digests, agreement.origins])
        if packed.device.type != "cuda":
            return cls(step, measured, agreement.norms, wire_bytes, packed, None)
        host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
        host.copy_(packed, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        return cls(step, measured, agreement.norms, wire_bytes, host, copied)

    def read(self) -> StepNumbers:
        """The step's numbers, once they have arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        numbers = self._host.tolist()
        loss, items, stop, lost, encoded, grad_norm, found_inf, loss_scale, rate_factor, applied, *rest = numbers
        (save, done, failed), slots = rest[:3], rest[3:]
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
            save_votes=int(save),
            done_votes=int(done),
            failed_votes=int(failed),
            digests=tuple(digests),
            wire_bytes=self.wire_bytes,
            compression_error=math.sqrt(lost / encoded) if encoded > 0 and math.isfinite(lost) else None,
            origins=tuple(rank for rank, count in enumerate(origins) if count),
        )

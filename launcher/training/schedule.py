"""The learning rate as a function of the applied steps, computed on the device.

Whether the last step was applied is known on the device alone until the host has read it, one step
later; so the count of applied steps, and what follows from it, stay there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from launcher.config.schema import Decay, ScheduleConfig

__all__ = ["Schedule"]


class Schedule:
    """Warm-up, then a decay that ends at ``final_fraction`` once ``total_steps`` steps were applied.

    With ``n`` steps applied so far, ``w`` warm-up steps, ``T`` steps in all and ``f`` the final fraction,
    the next step's factor is ``(n + 1) / w`` for ``n < w``; then, with ``p = (n - w) / (T - w)``:
    1 (constant), ``1 - (1 - f) p`` (linear), ``f + (1 - f) (1 + cos πp) / 2`` (cosine).
    """

    def __init__(self, config: ScheduleConfig, total_steps: int, device: torch.device) -> None:
        self._config = config
        self._total_steps = total_steps
        self.applied_steps = torch.zeros((), dtype=torch.float64, device=device)
        """Optimizer steps that were not skipped."""

    def factor(self) -> Tensor:
        """What the configured learning rate is multiplied by in the next step: float64 scalar on the device."""
        warmup, final = self._config.warmup_steps, self._config.final_fraction
        span = max(1, self._total_steps - warmup)
        progress = ((self.applied_steps - warmup) / span).clamp(0.0, 1.0)
        if self._config.decay is Decay.linear:
            decayed = 1.0 - (1.0 - final) * progress
        elif self._config.decay is Decay.cosine:
            decayed = final + (1.0 - final) * 0.5 * (1.0 + torch.cos(math.pi * progress))
        else:
            decayed = torch.ones_like(progress)
        if warmup == 0:
            return decayed
        rising = (self.applied_steps + 1.0) / warmup
        return torch.where(self.applied_steps < warmup, rising, decayed)

    def advance(self, found_inf: Tensor) -> None:
        """Count a step that was applied (0) or skipped (1)."""
        self.applied_steps.add_(1.0 - found_inf.double())

"""The loss scale and its rule, on the device: nothing here waits for the host or talks to other ranks.

The rule is torch.amp.GradScaler's (``_amp_update_scale_``), with Megatron-Core's hysteresis and with a
floor and a ceiling: without a floor a run of NaN steps takes the scale to 0, and the next clean step
divides by it; without a ceiling ``growth_interval=1`` takes it to 1.7e38.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from launcher.config.schema import LossScaleConfig

__all__ = ["DynamicLossScale", "LossScale", "NoLossScale", "ScaleRule", "build_loss_scale"]


class LossScale(Protocol):
    """What the step needs of a loss scale."""

    scale: Tensor
    """FP32 scalar on the device: the factor of this step's loss."""

    def update(self, found_inf: Tensor) -> None:
        """Take this step's outcome into account; ``found_inf`` is an FP32 scalar, exactly 0 or 1."""

    def state_dict(self) -> dict[str, Any]:
        """Numbers only; waits for the device."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""


@dataclass(frozen=True)
class ScaleRule:
    """How a scale answers to one step's outcome. The defaults are torch's own rule, to the last bit."""

    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    """Consecutive steps without overflow before the scale grows."""
    hysteresis: int = 1
    """Overflows to tolerate before the scale backs off, the last one included; refilled when the scale grows."""
    minimum: float = 0.0
    maximum: float = math.inf

    def advance(self, scale: Tensor, growth_tracker: Tensor, tolerance: Tensor, found_inf: Tensor) -> None:
        """One step, in place, by selection instead of branching.

        Args:
            scale: FP32 scalar.
            growth_tracker: int32 scalar, consecutive steps without overflow since the scale last changed.
            tolerance: int32 scalar, overflows left before the scale backs off.
            found_inf: FP32 scalar, more than 0 if the step overflowed.
        """
        overflow = found_inf > 0
        tolerance.sub_(overflow.to(torch.int32)).clamp_(min=0)
        backs_off = overflow & (tolerance <= 0)
        growth_tracker.add_(1).mul_((~overflow).to(torch.int32))
        grows = growth_tracker == self.growth_interval
        # torch multiplies in FP64 and rounds once, and does not grow past FP32.
        lower = (scale.double() * self.backoff_factor).float().clamp_(min=self.minimum)
        higher = (scale.double() * self.growth_factor).float()
        higher = torch.where(higher.isfinite(), higher, scale).clamp_(max=self.maximum)
        scale.copy_(torch.where(backs_off, lower, torch.where(grows, higher, scale)))
        tolerance.copy_(torch.where(grows, self.hysteresis, tolerance))
        growth_tracker.mul_((~grows).to(torch.int32))


class DynamicLossScale:
    """Backs off when a gradient overflows, grows after a while without overflow."""

    def __init__(self, config: LossScaleConfig, device: torch.device) -> None:
        self._rule = ScaleRule(
            growth_factor=config.growth_factor,
            backoff_factor=config.backoff_factor,
            growth_interval=config.growth_interval,
            hysteresis=config.hysteresis,
            minimum=config.minimum,
            maximum=config.maximum,
        )
        self.scale = torch.full((), config.initial, dtype=torch.float32, device=device)
        self.growth_tracker = torch.zeros((), dtype=torch.int32, device=device)
        """Consecutive steps without overflow since the scale last changed."""
        self.tolerance = torch.full((), config.hysteresis, dtype=torch.int32, device=device)
        """Overflows left before the scale backs off."""

    def update(self, found_inf: Tensor) -> None:
        """One step of the rule."""
        self._rule.advance(self.scale, self.growth_tracker, self.tolerance, found_inf)

    def state_dict(self) -> dict[str, Any]:
        """Every counter, as numbers."""
        return {
            "scale": self.scale.item(),
            "growth_tracker": int(self.growth_tracker.item()),
            "tolerance": int(self.tolerance.item()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError on keys that are missing or unknown, and on a scale that nothing can be scaled with."""
        expected = {"scale", "growth_tracker", "tolerance"}
        if set(state) != expected:
            raise ValueError(f"a loss scale's state has the keys {sorted(expected)}, not {sorted(state)}")
        if not (0 < state["scale"] < math.inf and min(state["growth_tracker"], state["tolerance"]) >= 0):
            raise ValueError(f"a loss scale has no such state: {state}")
        self.scale.fill_(state["scale"])
        # A shorter interval than the saved run's, already waited for, makes the next clean step grow.
        self.growth_tracker.fill_(min(state["growth_tracker"], self._rule.growth_interval - 1))
        self.tolerance.fill_(state["tolerance"])


class NoLossScale:
    """A scale of 1 that never changes: BF16 and FP32 need none."""

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.ones((), dtype=torch.float32, device=device)

    def update(self, found_inf: Tensor) -> None:
        """Nothing to do."""

    def state_dict(self) -> dict[str, Any]:
        """Empty: there is no state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError on a state that is not empty."""
        if state:
            raise ValueError(f"no loss scale is in use; its state would be empty, not {sorted(state)}")


def build_loss_scale(config: LossScaleConfig, device: torch.device) -> LossScale:
    """The scale that the configuration asks for."""
    return DynamicLossScale(config, device) if config.enabled else NoLossScale(device)

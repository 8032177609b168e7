"""The loss scale and its rule, on the device: nothing here waits for the host or talks to other ranks.

The rule is torch.amp.GradScaler's (``_amp_update_scale_``), with Megatron-Core's hysteresis and with a
floor and a ceiling: without a floor a run of NaN steps takes the scale to 0, and the next clean step
divides by it; without a ceiling ``growth_interval=1`` takes it to 1.7e38.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from launcher.config.schema import LossScaleConfig

__all__ = ["DynamicLossScale", "LossScale", "NoLossScale", "build_loss_scale"]


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


class DynamicLossScale:
    """Backs off when a gradient overflows, grows after a while without overflow."""

    def __init__(self, config: LossScaleConfig, device: torch.device) -> None:
        self._config = config
        self.scale = torch.full((), config.initial, dtype=torch.float32, device=device)
        self.growth_tracker = torch.zeros((), dtype=torch.int32, device=device)
        """Consecutive steps without overflow since the scale last changed."""
        self.tolerance = torch.full((), config.hysteresis, dtype=torch.int32, device=device)
        """Overflows left before the scale backs off."""

    def update(self, found_inf: Tensor) -> None:
        """One step of the rule, by selection instead of branching."""
        config = self._config
        overflow = found_inf > 0
        self.tolerance.sub_(overflow.to(torch.int32)).clamp_(min=0)
        backs_off = overflow & (self.tolerance <= 0)
        self.growth_tracker.add_(1).mul_((~overflow).to(torch.int32))
        grows = self.growth_tracker >= config.growth_interval
        lower = (self.scale * config.backoff_factor).clamp_(min=config.minimum)
        higher = (self.scale * config.growth_factor).clamp_(max=config.maximum)
        self.scale.copy_(torch.where(backs_off, lower, torch.where(grows, higher, self.scale)))
        self.tolerance.copy_(torch.where(grows, config.hysteresis, self.tolerance))
        self.growth_tracker.mul_((~grows).to(torch.int32))

    def state_dict(self) -> dict[str, Any]:
        """Every counter, as numbers."""
        return {
            "scale": self.scale.item(),
            "growth_tracker": int(self.growth_tracker.item()),
            "tolerance": int(self.tolerance.item()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError on keys that are missing or unknown."""
        expected = {"scale", "growth_tracker", "tolerance"}
        if set(state) != expected:
            raise ValueError(f"a loss scale's state has the keys {sorted(expected)}, not {sorted(state)}")
        self.scale.fill_(state["scale"])
        self.growth_tracker.fill_(state["growth_tracker"])
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

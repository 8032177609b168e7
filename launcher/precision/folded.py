"""The optimizer step that unscales, normalises, clips and skips by itself.

torch's fused optimizers divide each gradient by ``optimizer.grad_scale`` and leave everything alone where
``optimizer.found_inf`` is 1, in the same pass that updates the weights. So whatever divides a gradient
(loss scale, number of items, clipping) is folded into that one number, and no further pass over
the gradients is made. Optimizers without this take a slower path, which is as correct.

Calls into torch: the ``grad_scale``/``found_inf`` attributes, ``_step_supports_amp_scaling`` and the names of
optimizer state are torch's own protocol with its GradScaler; ``tests/unit/test_folded.py`` notices a change.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from launcher.precision.group_state import GroupState
from launcher.precision.stepped import SteppedParameters

__all__ = ["FoldedOptimizer", "Gradients"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gradients:
    """This rank's part of a step's gradients, as plain tensors."""

    indices: list[int]
    """Which parameters they belong to, in the optimizer's order; parameters without one are passed over."""
    values: list[Tensor]


class FoldedOptimizer:
    """An optimizer that is stepped with a divisor and an overflow flag, both on the device.

    Args:
        optimizer: any torch optimizer. Fused Adam, AdamW, SGD and Adagrad fold; others are slower.
        stepped: what the optimizer steps for each of the model's parameters; the parameters themselves if None.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, stepped: SteppedParameters | None = None) -> None:
        self.optimizer = optimizer
        self.stepped = stepped or SteppedParameters()
        self.group_state = GroupState(optimizer)
        """What the optimizer has changed in its groups since now."""
        self._base_rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.folds = _folds(optimizer)
        """Whether one pass does everything, with no wait for the device."""
        _materialise_moments(optimizer)
        if self.folds:
            _materialise_momentum(optimizer)
        else:
            _log.warning(
                "%s cannot fold unscaling and clipping into its step: each step takes one more pass over the "
                "gradients and one wait for the device. fused=True, where the optimizer has it, avoids both.",
                type(optimizer).__name__,
            )

    @property
    def parameters(self) -> list[Tensor]:
        """The model's parameters, in the optimizer's order: that of its groups."""
        return [self.stepped.source(target) for group in self.optimizer.param_groups for target in group["params"]]

    def gradients(self) -> Gradients:
        """The gradients there are, bound to what is stepped."""
        bound = self.stepped.bind_gradients(self.optimizer)
        indices = [index for index, gradient in enumerate(bound) if gradient is not None]
        return Gradients(indices, [gradient for gradient in bound if gradient is not None])

    def set_rate_factor(self, factor: Tensor) -> None:
        """Multiply every group's configured learning rate by ``factor``, a float64 scalar on the device."""
        if self.folds:
            rates: Sequence[Any] = [(base * factor).float() for base in self._base_rates]
        else:
            rates = [base * factor.item() for base in self._base_rates]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def step(self, divisor: Tensor, found_inf: Tensor) -> None:
        """Divide the gradients by ``divisor`` and step, or change nothing at all.

        Args:
            divisor: FP32 scalar on the device.
            found_inf: FP32 scalar on the device, exactly 0 (step) or 1 (skip).
        """
        if self.folds:
            # Read by the fused kernels; deleted so that nobody else's step picks them up.
            self.optimizer.grad_scale = divisor  # type: ignore[attr-defined]
            self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
            try:
                self.optimizer.step()
            finally:
                del self.optimizer.grad_scale, self.optimizer.found_inf  # type: ignore[attr-defined]
        elif not found_inf.item():
            gradients = self.gradients().values
            if gradients:
                torch._foreach_div_(gradients, divisor)
            self.optimizer.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        self.stepped.zero_grad()


def _folds(optimizer: torch.optim.Optimizer) -> bool:
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    # SGD's first step sets momentum to the gradient itself, and an overflow then leaves it unwritten;
    # starting it at zero is the same only without dampening.
    return not any(group.get("momentum", 0) and group.get("dampening", 0) for group in optimizer.param_groups)


_ADAM: dict[str, str | None] = {"exp_avg": None, "exp_avg_sq": None, "max_exp_avg_sq": "amsgrad"}
_MOMENTS: dict[type, dict[str, str | None]] = {
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.RMSprop: {"square_avg": None, "momentum_buffer": "momentum", "grad_avg": "centered"},
}
"""By optimizer: what it keeps for each parameter, and the option that asks for it."""


def _materialise_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give Adam and RMSprop their state now, as their first step would: zeros, and no step counted.

    A checkpoint of a run whose steps were all skipped is then like any other, and memory is reserved at the start. And
    a run may go on with an option that asks for more state (amsgrad, momentum, centered): their steps only look for it.
    """
    moments = _MOMENTS.get(type(optimizer))
    if moments is None:
        return
    for group in optimizer.param_groups:
        on_device = group["capturable"] or group.get("fused")
        for parameter in filter(lambda one: one.requires_grad, group["params"]):
            state = optimizer.state[parameter]
            state["step"] = torch.zeros((), device=parameter.device if on_device else None)
            for key, option in moments.items():
                if option is None or group[option]:
                    state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def _materialise_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give SGD its momentum buffers now, as zeros.

    torch's fused SGD allocates them uninitialised in its first step; if that step is skipped (as the first
    steps with a high loss scale are), the second reads whatever was in that memory.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        if group["momentum"]:
            for parameter in group["params"]:
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))

"""torch.amp.GradScaler for anybody's own loop, with one decision for all ranks.

torch's scaler looks at this rank's gradients, or at the mesh of the first DTensor among them; ranks then part
silently as soon as one of them overflows alone. Here the flag is agreed over the process group, and
the rest is torch's: the class is a subclass, so that ``isinstance`` checks and saved states keep working.

The training loop of T-minus does not use this: it folds the flag into its own collective (``control.py``).

Private names of torch that are relied on, all in this file: the scaler's ``_scale``, ``_growth_tracker``,
``_init_scale``, ``_init_growth_tracker``, ``_growth_factor``, ``_backoff_factor``, ``_growth_interval``,
``_device``, ``_enabled``, ``_per_optimizer_states``, ``_unscale_grads_``, ``_check_scale_growth_tracker`` and
``_lazy_init_scale_growth_tracker``; the optimizers' ``_step_supports_amp_scaling``; the operator
``torch._amp_foreach_non_finite_check_and_unscale_``. ``tests/unit/test_grad_scaler.py`` notices a change.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from launcher.errors import ConfigurationError, JobError
from launcher.precision.loss_scale import ScaleRule

__all__ = ["DistributedGradScaler"]

_log = logging.getLogger(__name__)

_KEYS = frozenset({"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"})
_TOLERANCE = "_tolerance"
_FP32_MAX = torch.finfo(torch.float32).max


class DistributedGradScaler(torch.amp.GradScaler):
    """A drop-in for ``torch.amp.GradScaler`` on any number of ranks, with any mix of gradients.

    **The flag.** One ``all_reduce(MAX)`` of one FP32 number per optimizer and step: in ``unscale_(optimizer)`` if
    that is called, else in ``step(optimizer)``. Every rank of the group must call the same of the two for the
    same optimizers in the same order, and that is all: a rank where an optimizer has no gradient takes part too.
    Gradients may be plain, sharded, replicated or absent, on one mesh or on several, in one optimizer. A
    ``Partial`` gradient is unscaled as it is (its pending sum or mean is linear) and each rank's own part
    is looked at; parts that are finite and overflow only when they are summed later are not seen.

    **The rule** is torch's, step for step, unless ``hysteresis``, ``minimum`` or ``maximum`` is given. One thing is
    never done: to step with a scale whose reciprocal is not finite in FP32 (which is where an endless run of NaN
    leads if ``minimum`` is 0), since that writes NaN into the weights; such a step is skipped.

    **Fused optimizers** unscale and skip by themselves, without a wait for the device. Where their kernel cannot
    (DTensors in anything but Adam and AdamW; DTensors mixed with plain gradients or on several meshes), the
    step is made by torch's unfused code instead: correct, slower, logged once. The same holds for fused SGD with
    dampening until its momentum exists.

    **State.** With ``hysteresis=1`` the keys are torch's exactly. With more there is one more, ``_tolerance``, which
    torch's ``load_state_dict`` passes over; a state without it loads with full tolerance.

    Pickling and copying work as in torch, between iterations; a scaler with a ``process_group`` cannot be pickled.

    Args:
        device: where the scale lives, "cpu" or "cuda"; the process group's backend must reduce there.
        init_scale: the first scale.
        growth_factor: multiplies the scale after ``growth_interval`` steps without overflow; more than 1.
        backoff_factor: multiplies the scale on overflow; less than 1.
        growth_interval: steps.
        enabled: False turns every method into torch's no-op; nothing is agreed on then.
        hysteresis: overflows to tolerate before the scale backs off, the last one included; refilled when it
            grows (Megatron-Core's rule). At least 1.
        minimum: the scale never falls below it, nor is set or loaded below it.
        maximum: the scale never rises above it, nor is set or loaded above it.
        process_group: which ranks agree; None for the default group, or for this process alone if there is none
            when the flag is needed.

    Raises:
        ConfigurationError: a keyword-only argument does not fit, or this rank is not in ``process_group``.
        AssertionError: a growth or backoff factor that torch refuses.
    """

    def __init__(  # noqa: PLR0913, torch's arguments and ours
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        hysteresis: int = 1,
        minimum: float = 0.0,
        maximum: float = math.inf,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(device, init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        if hysteresis < 1:
            raise ConfigurationError(f"hysteresis={hysteresis} must be at least 1, which is torch's rule.")
        if not 0.0 <= minimum <= init_scale <= maximum:
            raise ConfigurationError(
                f"init_scale={init_scale} must lie between minimum={minimum} (at least 0) and maximum={maximum}."
            )
        if process_group is not None and dist.get_rank(process_group) < 0:
            raise ConfigurationError("This rank is not in process_group: pass the group that this rank belongs to.")
        self._hysteresis = hysteresis
        self._minimum = minimum
        self._maximum = maximum if maximum <= _FP32_MAX else math.inf
        self._process_group = process_group
        self._init_tolerance = hysteresis
        self._tolerance: Tensor | None = None
        self._told: set[int] = set()

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Step or skip, as all ranks do; collective unless ``unscale_`` was called for ``optimizer``.

        Unfused optimizers wait for the device once, to know. A skipped step leaves parameters and optimizer state
        as they are, bit for bit (momentum buffers of a fused SGD may appear, as zeros).

        Args:
            optimizer: any torch optimizer.
            args, kwargs: passed on to ``optimizer.step``; closures are refused, as in torch.

        Returns:
            What ``optimizer.step`` returns; None for a skipped step of an unfused optimizer.

        Raises:
            JobError: a gradient is sparse, or FP16 and must be unscaled in place. Raised after the collective, so
                that the other ranks skip the step instead of waiting.
            RuntimeError: twice since ``update``, or a closure, as in torch.
        """
        if not self.is_enabled():
            return super().step(optimizer, *args, **kwargs)
        reason = _why_not_fused(optimizer)
        if reason is None:
            return super().step(optimizer, *args, **kwargs)
        if getattr(optimizer, "_step_supports_amp_scaling", False) and id(optimizer) not in self._told:
            self._told.add(id(optimizer))
            _log.warning(
                "%s: %s, which its fused kernel cannot step; torch's unfused code steps it, one parameter at a time "
                "and with one wait for the device.",
                type(optimizer).__name__,
                reason,
            )
        with _unfused(optimizer):
            return super().step(optimizer, *args, **kwargs)

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Take this iteration's steps into account, or set the scale; on the device, not collective.

        Args:
            new_scale: a new scale, a number or a tensor of one element; brought between floor and ceiling.

        Raises:
            AssertionError: no optimizer was unscaled or stepped since the last update, as in torch.
        """
        if not self.is_enabled():
            return
        scale, growth_tracker = self._check_scale_growth_tracker("update")
        if new_scale is not None:
            super().update(new_scale if isinstance(new_scale, Tensor) else float(new_scale))
            scale.clamp_(min=self._minimum, max=self._maximum)
            return
        flags = [
            flag.to(scale.device, non_blocking=True)
            for state in self._per_optimizer_states.values()
            for flag in state["found_inf_per_device"].values()
        ]
        if not flags:
            raise AssertionError("No inf checks were recorded prior to update.")
        assert self._tolerance is not None
        rule = ScaleRule(
            self._growth_factor,
            self._backoff_factor,
            self._growth_interval,
            self._hysteresis,
            self._minimum,
            self._maximum,
        )
        rule.advance(scale, growth_tracker, self._tolerance, torch.stack(flags).amax())
        self._per_optimizer_states.clear()

    def state_dict(self) -> dict[str, Any]:
        """torch's keys, and ``_tolerance`` if ``hysteresis`` is more than 1; numbers only; waits for the device."""
        state = super().state_dict()
        if state and self._hysteresis > 1:
            state[_TOLERANCE] = self._current_tolerance()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what this class or ``torch.amp.GradScaler`` saved; a disabled scaler ignores it, as in torch.

        The scale is brought between floor and ceiling: a state of scale 0 becomes usable.

        Raises:
            RuntimeError: the state is empty (saved by a disabled scaler), as in torch.
            ConfigurationError: keys are missing or unknown; nothing was loaded.
        """
        if not self.is_enabled():
            return
        if state_dict and not _KEYS <= set(state_dict) <= _KEYS | {_TOLERANCE}:
            raise ConfigurationError(
                f"a gradient scaler's state has the keys {sorted(_KEYS)} and possibly {_TOLERANCE!r}, "
                f"not {sorted(state_dict)}: pass what state_dict() returned."
            )
        bounded = dict(state_dict)
        if bounded:
            bounded["scale"] = min(max(float(bounded["scale"]), self._minimum), self._maximum)
            bounded["_growth_tracker"] = int(bounded["_growth_tracker"])
        super().load_state_dict(bounded)
        self._init_tolerance = min(int(bounded.get(_TOLERANCE, self._hysteresis)), self._hysteresis)
        if self._tolerance is not None:
            self._tolerance.fill_(self._init_tolerance)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.update(_init_tolerance=self._current_tolerance(), _tolerance=None, _told=set())
        return state

    def _current_tolerance(self) -> int:
        return self._init_tolerance if self._tolerance is None else int(self._tolerance.item())

    def _lazy_init_scale_growth_tracker(self, dev: torch.device) -> None:
        super()._lazy_init_scale_growth_tracker(dev)
        self._tolerance = torch.full((), self._init_tolerance, dtype=torch.int32, device=dev)

    def _check_scale_growth_tracker(self, funcname: str) -> tuple[Tensor, Tensor]:
        # Whoever needs the scale first makes it, whether or not scale() was called; not the constructor, which
        # may run before torch.cuda.set_device and would then open a context on the wrong GPU.
        if self._scale is None:
            self._lazy_init_scale_growth_tracker(torch.device(self._device))
        return super()._check_scale_growth_tracker(funcname)

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        """Unscale this rank's shards, agree on the flag; collective, and the only one of a step.

        Args:
            optimizer: whose gradients.
            inv_scale: FP32 scalar; 1 if the optimizer unscales by itself.
            found_inf: FP32 scalar on the scale's device, 0; becomes exactly 0 or 1.
            allow_fp16: whether FP16 gradients may come (they do if the optimizer unscales).
        """
        assert self._scale is not None
        found_inf.copy_(~self._scale.reciprocal().isfinite())
        refusal = None
        try:
            _unscale(_local_gradients(optimizer, allow_fp16), inv_scale, found_inf)
        except JobError as error:
            refusal = error
            found_inf.fill_(1.0)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(self._process_group) > 1:
            dist.all_reduce(found_inf, op=dist.ReduceOp.MAX, group=self._process_group)
        if refusal is not None:
            raise refusal
        return {found_inf.device: found_inf}


def _local_gradients(optimizer: torch.optim.Optimizer, allow_fp16: bool) -> list[Tensor]:
    """The gradients that this rank holds, as plain tensors; raises JobError on those that cannot be unscaled."""
    gradients = []
    for parameter in _with_gradient(optimizer):
        gradient = parameter.grad
        shape = tuple(parameter.shape)
        if gradient.layout is not torch.strided:
            raise JobError(
                f"The gradient of a parameter of shape {shape} is sparse, which cannot be unscaled in one pass: "
                "build its embedding with sparse=False, or step it with an optimizer outside of the scaler."
            )
        if gradient.dtype is torch.float16 and not allow_fp16:
            raise JobError(
                f"Attempting to unscale FP16 gradients (of a parameter of shape {shape}), whose small values would "
                "become zero: keep the parameters in FP32 and let autocast compute in FP16."
            )
        gradients.append(gradient.to_local() if isinstance(gradient, DTensor) else gradient)
    return gradients


@torch.no_grad()
def _unscale(gradients: list[Tensor], inv_scale: Tensor, found_inf: Tensor) -> None:
    """One pass for each device and dtype: multiply by ``inv_scale``, raise ``found_inf`` to 1."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        groups[gradient.device, gradient.dtype].append(gradient)
    for (device, _), members in groups.items():
        flag = found_inf if device == found_inf.device else torch.zeros((), device=device)
        torch._amp_foreach_non_finite_check_and_unscale_(members, flag, inv_scale.to(device, non_blocking=True))
        if flag is not found_inf:
            found_inf.copy_(torch.maximum(found_inf, flag.to(found_inf.device, non_blocking=True)))


def _with_gradient(optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    return (
        parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.grad is not None
    )


def _why_not_fused(optimizer: torch.optim.Optimizer) -> str | None:
    """Why neither a fused nor a foreach kernel can make this step; None if it can. Prepares SGD's momentum."""
    meshes = {
        parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
        for parameter in _with_gradient(optimizer)
    }
    if len(meshes) > 1:
        return (
            "its gradients are plain and DTensors at once" if None in meshes else "its gradients are on several meshes"
        )
    if not any(group.get("fused") for group in optimizer.param_groups):
        return None
    if meshes - {None} and isinstance(optimizer, (torch.optim.SGD, torch.optim.Adagrad)):
        return "its gradients are DTensors"
    if isinstance(optimizer, torch.optim.SGD) and not _materialise_momentum(optimizer):
        return "it has dampening and no momentum yet"
    return None


def _materialise_momentum(optimizer: torch.optim.SGD) -> bool:
    """Give SGD the momentum buffers that it lacks, as zeros; False if that would change its first step.

    torch's fused SGD allocates them uninitialised, and leaves them so if the flag says skip; the next step
    then reads whatever was in that memory. Starting from zero is the same step, unless there is dampening.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            missing = optimizer.state.get(parameter, {}).get("momentum_buffer") is None
            if parameter.grad is None or not missing:
                continue
            if group["dampening"]:
                return False
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)
    return True


@contextmanager
def _unfused(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Have torch's scaler unscale, and the optimizer step one parameter at a time."""
    asked: list[dict[str, Any]] = [
        {key: group[key] for key in ("fused", "foreach") if key in group} for group in optimizer.param_groups
    ]
    supports = optimizer.__dict__.get("_step_supports_amp_scaling")
    divisor = optimizer.__dict__.pop("grad_scale", None)
    if divisor is not None:  # set by the user, for the fused kernel to divide by
        for gradient in _local_gradients(optimizer, allow_fp16=True):
            gradient.div_(divisor)
    for group, keys in zip(optimizer.param_groups, asked, strict=True):
        group.update(dict.fromkeys(keys, False))
    if supports is not None:
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for group, keys in zip(optimizer.param_groups, asked, strict=True):
            group.update(keys)
        if supports is not None:
            optimizer._step_supports_amp_scaling = supports  # type: ignore[attr-defined]

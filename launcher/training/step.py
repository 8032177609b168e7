"""One optimizer step, as prose: accumulate, agree, judge, apply, advance.

In the steady state it makes one control collective, waits for nothing on the device, and passes over the
gradients twice: once to measure them, once inside the fused optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from launcher.errors import JobError
from launcher.job import Job, LossOutput
from launcher.parallel import ParallelModel
from launcher.precision import NO_VOTES, Agreement, CheckpointVotes, ControlCollective, FoldedOptimizer, LossScale, Sums
from launcher.training.outcome import StepTicket, Verdict
from launcher.training.schedule import Schedule

__all__ = ["Learner", "train_step"]


@dataclass
class Learner:
    """Everything that a step reads and changes."""

    job: Job
    model: ParallelModel
    optimizer: FoldedOptimizer
    loss_scale: LossScale
    schedule: Schedule
    control: ControlCollective
    device: torch.device
    dtype: torch.dtype
    """What autocast computes in; float32 turns autocast off."""
    max_grad_norm: float | None
    world_size: int
    accumulation_steps: int
    measure_every: int
    """Steps between two that measure what is lost on the wire."""
    parameter_names: list[str]
    """Of what is trained, in the optimizer's order."""
    expected_items: float | None = None
    """Items in a global batch, to the next power of two, as the first step saw them; fixed for the run."""
    steps: int = 0
    """Steps attempted."""
    zero: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.zero = torch.zeros((), dtype=torch.float64, device=self.device)

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32)


def train_step(
    learner: Learner, micro_batches: Iterable[Any], stop: bool, checkpoint: CheckpointVotes = NO_VOTES
) -> StepTicket:
    """Attempt one optimizer step on this rank's micro-batches.

    Args:
        learner: changed in place.
        micro_batches: ``accumulation_steps`` collated batches.
        stop: whether this rank votes to stop after this step.
        checkpoint: this rank's votes on checkpoints.

    Returns:
        A ticket for the step's numbers, which are still on the device.
    """
    rate_factor = learner.schedule.factor()
    learner.optimizer.set_rate_factor(rate_factor)
    loss_scale = learner.loss_scale.scale.clone()
    wire = learner.model.wire
    wire.begin(loss_scale, measures=(learner.steps + 1) % learner.measure_every == 0)

    sums = _accumulate(learner, micro_batches)
    if learner.steps == 0:
        learner.model.check_gradients()
    gradients = learner.optimizer.gradients()
    agreement = learner.control.agree(
        gradients.values,
        sums,
        digest=_digest(learner, loss_scale, rate_factor),
        stop=stop,
        share=1.0 / learner.model.num_gradient_copies,
        origin=learner.model.probe.take() if learner.model.probe is not None else None,
        lost=wire.take_lost(),
        checkpoint=checkpoint,
    )
    assert learner.expected_items is not None
    verdict = judge(agreement, loss_scale, learner.expected_items, learner.max_grad_norm)
    learner.optimizer.step(verdict.divisor, verdict.found_inf)
    wire.conclude(verdict.found_inf)
    learner.optimizer.zero_grad()
    learner.loss_scale.update(verdict.found_inf)
    learner.schedule.advance(verdict.found_inf)
    learner.steps += 1

    return StepTicket.of(
        step=learner.steps,
        gradients=gradients,
        agreement=agreement,
        verdict=verdict,
        loss_scale=loss_scale,
        rate_factor=rate_factor,
        applied_steps=learner.schedule.applied_steps,
        wire_bytes=wire.take_bytes(),
    )


def _accumulate(learner: Learner, micro_batches: Iterable[Any]) -> Sums:
    """Forward and backward over the micro-batches; the gradients cross the wire in the last one."""
    loss, items = learner.zero.clone(), learner.zero.clone()
    last = learner.accumulation_steps - 1
    # The ranks' gradients are averaged or summed on their way; summed is what is meant.
    ranks = learner.world_size if learner.model.averages else 1
    for index, batch in enumerate(micro_batches):
        with learner.model.synchronising(last=index == last):
            with learner.autocast():
                output = _loss(learner, to_device(batch, learner.device))
            checked(output, learner.job)
            count = _as_tensor(output.items, learner.device)
            if learner.expected_items is None:
                learner.expected_items = _expected_items(learner, count)
            scale = learner.loss_scale.scale * (ranks / learner.expected_items)
            torch.autograd.backward(output.loss.float() * scale)
        loss += output.loss.detach()
        items += count
    return Sums(loss=loss, items=items)


def _loss(learner: Learner, batch: Any) -> LossOutput:
    try:
        return learner.job.compute_loss(learner.model.training, batch)
    except RuntimeError as error:
        if "mixed dtype (CPU)" in str(error):
            error.add_note(
                "On CPUs a layer or group norm takes its input in the type of its weights, which under zero2, fsdp and "
                "hsdp is the precision's: give it norm(x.to(norm.weight.dtype)), or use parallel=ddp or precision=fp32."
            )
        raise


def _expected_items(learner: Learner, count: Tensor) -> float:
    """The size of a global batch in items, for the run's constant factor: once, in the first micro-batch.

    Only the magnitude matters, so that FP16 gradients are those of about a mean; each step divides by
    its own number of items exactly.
    """
    total = count.clone()
    if learner.world_size > 1:
        torch.distributed.all_reduce(total)
    expected = max(total.item() * learner.accumulation_steps, 1.0)
    return float(2.0 ** round(math.log2(expected)))


def _digest(learner: Learner, loss_scale: Tensor, rate_factor: Tensor) -> Tensor:
    """A number that is the same on all ranks as long as they are in the same state."""
    return loss_scale.double() + rate_factor * 1e-3 + learner.schedule.applied_steps * 1e3 + float(learner.steps)


def judge(agreement: Agreement, loss_scale: Tensor, expected_items: float, max_grad_norm: float | None) -> Verdict:
    """Turn what all ranks agreed on into one flag and one divisor; every rank computes the same."""
    finite = agreement.squared_norm.isfinite() & (agreement.non_finite == 0)
    items = torch.where(agreement.items > 0, agreement.items, 1.0)
    divisor = loss_scale.double() * items / expected_items
    grad_norm = agreement.squared_norm.sqrt() / divisor
    if max_grad_norm is not None:
        divisor = divisor * ((grad_norm + 1e-6) / max_grad_norm).clamp(min=1.0)
    return Verdict(found_inf=(~finite).float(), divisor=divisor.float(), grad_norm=grad_norm)


def to_device(batch: Any, device: torch.device) -> Any:
    """Tensors in tuples, lists and dicts, moved without blocking; anything else as it is."""
    if isinstance(batch, Tensor) or hasattr(batch, "to"):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def checked(output: Any, job: Job) -> LossOutput:
    """Raises JobError if ``compute_loss`` returned what the engine cannot use."""
    name = f"{type(job).__name__}.compute_loss"
    if not isinstance(output, LossOutput):
        raise JobError(f"{name} returned {type(output).__name__}: return a launcher.LossOutput.")
    if not isinstance(output.loss, Tensor) or output.loss.ndim != 0:
        shape = tuple(output.loss.shape) if isinstance(output.loss, Tensor) else type(output.loss).__name__
        raise JobError(f"{name}: LossOutput.loss must be a scalar tensor, the sum over the items, not {shape}.")
    if torch.is_grad_enabled() and not output.loss.requires_grad:
        raise JobError(f"{name}: LossOutput.loss has no gradient; compute it from the model that is passed in.")
    items = output.items
    if not isinstance(items, (int, float, Tensor)) or (isinstance(items, Tensor) and items.ndim != 0):
        shape = tuple(items.shape) if isinstance(items, Tensor) else type(items).__name__
        raise JobError(f"{name}: LossOutput.items must be a number or a scalar tensor, not {shape}.")
    return output


def _as_tensor(items: int | float | Tensor, device: torch.device) -> Tensor:
    if isinstance(items, Tensor):
        return items.detach().to(device=device, dtype=torch.float64)
    return torch.full((), float(items), dtype=torch.float64, device=device)

"""The loop: steps until the end, a request to stop, or a diagnosis that training cannot go on.

It reads each step's numbers one step later, when they have long arrived. All ranks read the same
numbers, so they report, validate, stop and give up after the same step without asking each other.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch.utils.data import Dataset

from launcher.checkpoint.snapshot import Snapshot
from launcher.config.schema import LossScaleConfig, TrainConfig
from launcher.errors import DesynchronisedError, DivergenceError, JobError
from launcher.observe import Reporter, StepTiming
from launcher.precision import attribute
from launcher.training.batches import Data
from launcher.training.checkpointing import Checkpoints, NoCheckpoints
from launcher.training.outcome import StepNumbers, StepTicket
from launcher.training.progress import Best, Identity, Progress, take_snapshot
from launcher.training.step import Learner, train_step
from launcher.training.stop import StopRequest
from launcher.training.validation import validate

__all__ = ["Outcome", "Trainer", "total_steps"]


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended."""

    finished: bool
    """False: stopped on request."""
    step: int
    loss: float
    """Of the last step."""
    validation: dict[str, float] | None
    """After the last step; None without a validation dataset, or if stopped."""


def total_steps(
    config: TrainConfig, global_batch_size: int, num_samples: int | None, step: int = 0, samples: int = 0
) -> int:
    """The steps of a run; those of ``max_epochs`` see every sample that often, the last one a few more.

    Args:
        config: says how long.
        global_batch_size: from here on.
        num_samples: in an epoch; None where nobody knows.
        step, samples: made and used already.

    Raises:
        JobError: epochs are asked for, and nobody knows when one ends.
    """
    if config.max_steps is not None:
        return config.max_steps
    assert config.max_epochs is not None
    if num_samples is None:
        raise JobError(
            f"train.max_epochs={config.max_epochs}, but the training data has no length: use train.max_steps."
        )
    return step + max(0, -(-(config.max_epochs * num_samples - samples) // global_batch_size))


@dataclass
class Trainer:
    """One attempt at a run, on one rank."""

    learner: Learner
    data: Data
    validation: Dataset[Any] | None
    config: TrainConfig
    loss_scale: LossScaleConfig
    total_steps: int
    reporter: Reporter
    stop: StopRequest
    hosts: tuple[str, ...]
    """Each rank's."""
    identity: Identity | None = None
    """What checkpoints say of the run; None if there are none."""
    progress: Progress = field(default_factory=Progress)
    checkpoints: Checkpoints = field(default_factory=NoCheckpoints)

    def train(self) -> Outcome:
        """Run to the end, or to the step after which all ranks have agreed to stop."""
        learner = self.learner
        stream = self._stream()
        self.checkpoints.prepare(self._snapshot)
        pending: _Pending | None = None
        numbers: StepNumbers | None = None
        while learner.steps < self.total_steps and not (numbers is not None and numbers.stop):
            started = time.perf_counter()
            data_seconds = stream.seconds
            micro_batches = islice(stream, learner.accumulation_steps)
            ticket = train_step(learner, micro_batches, self.stop.requested, self.checkpoints.votes)
            if pending is not None:
                numbers = self._conclude(pending, ended=started)
            pending = _Pending(ticket, started, stream.seconds - data_seconds)
            self.progress.validation = None
            if self._validates_after(learner.steps):
                numbers, pending = self._conclude(pending), None
                self.progress.validation = self._validate()
                if learner.steps < self.total_steps:
                    self.checkpoints.judge(learner.steps, self.progress.validation, self._snapshot)
            if self._saves_now(numbers):
                if pending is not None:
                    numbers, pending = self._conclude(pending), None
                self.checkpoints.save(learner.steps, self._snapshot)
        if pending is not None:
            numbers = self._conclude(pending)
        finished = learner.steps >= self.total_steps
        self.checkpoints.finish(learner.steps, self._snapshot, complete=finished)
        return Outcome(finished, learner.steps, self.progress.loss, self.progress.validation if finished else None)

    def _stream(self) -> _TimedBatches:
        steps, pin_memory = range(self.learner.steps, self.total_steps), self.learner.device.type == "cuda"
        workers, offset = self.config.num_data_workers, self.progress.offset
        return _TimedBatches(self.data.micro_batches(steps, workers, pin_memory, offset))

    def _snapshot(self, best: Best | None) -> Snapshot:
        assert self.identity is not None
        return take_snapshot(self.learner, self.data, self.identity, self.progress, best)

    def _saves_now(self, numbers: StepNumbers | None) -> bool:
        """The last step's state is saved in any case, after the loop."""
        step = self.learner.steps
        due = self.checkpoints.due(step, numbers, self.progress.validation)
        return due and step < self.total_steps

    def _validates_after(self, step: int) -> bool:
        if self.validation is None:
            return False
        every = self.config.eval_every
        return step == self.total_steps or (every is not None and step % every == 0)

    def _validate(self) -> dict[str, float]:
        assert self.validation is not None
        assert self.config.micro_batch_size is not None
        metrics = validate(
            self.learner, self.validation, self.config.micro_batch_size, self.data.rank, self.config.num_data_workers
        )
        self.reporter.validation(self.learner.steps, metrics)
        return metrics

    def _conclude(self, pending: _Pending, ended: float | None = None) -> StepNumbers:
        """Report a step, which lasted until ``ended`` (now), and give up if its numbers say so."""
        numbers = pending.ticket.read()
        self.reporter.step(numbers, StepTiming((ended or time.perf_counter()) - pending.started, pending.data_seconds))
        self._check_together(numbers)
        if numbers.overflow:
            self._report_overflow(pending.ticket, numbers)
        self._check_progress(numbers)
        self.progress.loss = numbers.loss
        self.checkpoints.observe(numbers, self.learner.steps)
        return numbers

    def _report_overflow(self, ticket: StepTicket, numbers: StepNumbers) -> None:
        """Say where a skipped step's gradients went wrong; collective."""
        looked = self.learner.model.probe is not None
        found = attribute(
            ticket.measured,
            ticket.norms,
            self.learner.parameter_names,
            numbers.origins if looked else None,
            self.hosts,
        )
        self.reporter.event(
            "overflow",
            step=numbers.step,
            loss_scale=numbers.loss_scale,
            loss_is_finite=math.isfinite(numbers.loss),
            ranks=list(found.ranks),
            hosts=list(found.hosts),
            before_wire=found.before_wire,
            num_parameters=found.num_parameters,
            parameters=list(found.parameters),
        )

    def _check_together(self, numbers: StepNumbers) -> None:
        """Raises DesynchronisedError naming the ranks whose state has parted from most others'."""
        usual, _ = Counter(numbers.digests).most_common(1)[0]
        parted = [rank for rank, digest in enumerate(numbers.digests) if digest != usual]
        if parted:
            raise DesynchronisedError(
                f"At step {numbers.step} the state (steps, loss scale, learning rate) of rank(s) {parted} is not that "
                "of the other ranks. Their weights can no longer be trusted; look into those ranks' logs."
            )

    def _check_progress(self, numbers: StepNumbers) -> None:
        """Raises DivergenceError after too many skipped steps that no lower loss scale can help."""
        at_floor = not self.loss_scale.enabled or numbers.loss_scale <= self.loss_scale.minimum
        skips = self.progress.consecutive_skips + 1 if numbers.overflow and at_floor else 0
        self.progress.consecutive_skips = skips
        if skips < self.loss_scale.patience:
            return
        floor = f", with the loss scale at its minimum ({self.loss_scale.minimum:g})" if self.loss_scale.enabled else ""
        if math.isfinite(numbers.loss):
            diagnosis = (
                "The loss itself is finite, so the gradients are too large for the precision: lower optimizer.lr, "
                "normalise the loss or its inputs, or use precision=bf16, whose range is FP32's."
            )
        else:
            diagnosis = (
                "The loss itself is not finite, so no loss scale can help: look for bad samples, a division by zero "
                "or a logarithm of zero in the model, or a learning rate that has ruined the weights."
            )
        raise DivergenceError(
            f"The last {skips} steps, up to step {numbers.step}, were skipped because gradients were "
            f"not finite{floor}. {diagnosis} metrics.jsonl names the parameters and ranks of each overflow."
        )


@dataclass(frozen=True)
class _Pending:
    """A step whose numbers have not been read yet."""

    ticket: StepTicket
    started: float
    data_seconds: float


class _TimedBatches:
    """An iterator that knows how long its consumer has waited for it."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        started = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.seconds += time.perf_counter() - started

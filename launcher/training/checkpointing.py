"""When a run is saved, and what is said about it. How it is written is ``checkpoint.saver``'s business."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from launcher.checkpoint.saver import Failed, Saved, Saver
from launcher.checkpoint.snapshot import Snapshot
from launcher.config.nearest import nearest
from launcher.config.schema import BestMode, CheckpointConfig, OnFailure
from launcher.errors import CheckpointWriteError, ConfigurationError
from launcher.observe import Reporter
from launcher.precision import NO_VOTES, CheckpointVotes
from launcher.training.outcome import StepNumbers
from launcher.training.progress import Best

__all__ = ["Checkpoints", "NoCheckpoints", "RunCheckpoints", "TakeSnapshot"]

TakeSnapshot = Callable[[Best | None], Snapshot]
"""The state after the step that was just made, given the best validation so far."""


class Checkpoints(Protocol):
    """What the loop needs of checkpoints."""

    @property
    def votes(self) -> CheckpointVotes:
        """This rank's, for the next step."""

    def prepare(self, take: TakeSnapshot) -> None:
        """Before the first step; collective."""

    def observe(self, numbers: StepNumbers, steps_started: int) -> None:
        """A step's numbers have been read, ``steps_started`` steps having been started."""

    def due(self, step: int, numbers: StepNumbers | None, validation: dict[str, float] | None) -> bool:
        """Whether to save after ``step``; the same on every rank.

        Args:
            step: that was just made.
            numbers: that have been read last.
            validation: after this very step, if there was one.
        """

    def judge(self, step: int, validation: dict[str, float], take: TakeSnapshot) -> None:
        """Before the last step, ``step`` has been validated: see that the best can be told by it; collective.

        Raises:
            ConfigurationError: it lacks the metric; the state after ``step`` has been saved.
        """

    def save(self, step: int, take: TakeSnapshot) -> None:
        """Save the state after ``step``; collective."""

    def finish(self, step: int, take: TakeSnapshot, complete: bool) -> None:
        """The attempt's last step was made: have its state on the disk; collective.

        Args:
            step: the last.
            take: its state.
            complete: whether it is the run's last too, after which nobody would save it any more.
        """


class NoCheckpoints:
    """Nothing is saved."""

    votes = NO_VOTES

    def prepare(self, take: TakeSnapshot) -> None:
        """Nothing."""

    def observe(self, numbers: StepNumbers, steps_started: int) -> None:
        """Nothing."""

    def due(self, step: int, numbers: StepNumbers | None, validation: dict[str, float] | None) -> bool:
        """Never."""
        return False

    def judge(self, step: int, validation: dict[str, float], take: TakeSnapshot) -> None:
        """By nothing."""

    def save(self, step: int, take: TakeSnapshot) -> None:
        """Nothing."""

    def finish(self, step: int, take: TakeSnapshot, complete: bool) -> None:
        """Nothing."""


@dataclass
class RunCheckpoints:
    """A run's, as configured.

    Args:
        saver: writes.
        config: when and how.
        reporter: is told.
        rank: the first's clock decides.
        last_step: that has been saved already.
        best: the best validation so far, None if there was none; that of another metric or mode is forgotten.
    """

    saver: Saver
    config: CheckpointConfig
    reporter: Reporter
    rank: int
    last_step: int | None = None
    best: Best | None = None
    _saved_at: float = field(default_factory=time.monotonic, init=False)
    _saved_step: int = field(default=0, init=False)
    _problems: str = field(default="", init=False)
    """What kept the last checkpoint that failed from being written."""

    def __post_init__(self) -> None:
        judged_by = (self.config.best_metric, self.config.best_mode.value)
        if self.best is not None and (self.best.metric, self.best.mode) != judged_by:
            self.best = None

    @property
    def votes(self) -> CheckpointVotes:
        """This rank's, for the next step."""
        minutes = self.config.every_minutes
        late = self.rank == 0 and minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        done, failed = self.saver.votes
        return CheckpointVotes(save=late, done=done, failed=failed)

    def prepare(self, take: TakeSnapshot) -> None:
        """Reserve memory and agree on who writes what; collective."""
        self.saver.prepare(take(self.best))

    def observe(self, numbers: StepNumbers, steps_started: int) -> None:
        """Go on with the checkpoint that is being written, as far as all ranks have come.

        Raises:
            CheckpointWriteError: it failed, and the run is to stop then.
        """
        self._report(self.saver.observe(numbers.step, numbers.done_votes, numbers.failed_votes, steps_started))

    def due(self, step: int, numbers: StepNumbers | None, validation: dict[str, float] | None) -> bool:
        """By steps, by the clock, or because no validation was better."""
        every = self.config.every_steps
        by_steps = every is not None and step % every == 0
        by_clock = numbers is not None and numbers.step > self._saved_step and numbers.save_votes > 0
        return self._is_best(validation) or by_steps or by_clock

    def judge(self, step: int, validation: dict[str, float], take: TakeSnapshot) -> None:
        """See that the best can be told by ``validation``.

        Raises:
            ConfigurationError: it lacks the metric; the state after ``step`` has been saved.
        """
        metric = self.config.best_metric
        if not self.config.keep_best or metric in validation:
            return
        self.finish(step, take, complete=False)
        raise ConfigurationError(
            f"checkpoint.best_metric={metric}: there is no such metric of the validation.{nearest(metric, validation)} "
            f"There are: {', '.join(sorted(validation))}. The run is at step {step}: launch resume RUN "
            "checkpoint.best_metric=<one of these>, or checkpoint.keep_best=0."
        )

    def _is_best(self, validation: dict[str, float] | None) -> bool:
        value = (validation or {}).get(self.config.best_metric)
        if value is None or not math.isfinite(value):
            return False
        sign = 1 if self.config.best_mode is BestMode.min else -1
        if self.best is not None and sign * value >= sign * self.best.value:
            return False
        self.best = Best(value, self.config.best_metric, self.config.best_mode.value)
        return self.config.keep_best > 0

    def save(self, step: int, take: TakeSnapshot) -> None:
        """Save the state after ``step``; waits for the former checkpoint, if that is still being written.

        Raises:
            CheckpointWriteError: one of them failed, and the run is to stop then.
        """
        self._report(self.saver.settle())
        self._saved_at = time.monotonic()
        self.last_step = self._saved_step = step
        self.saver.begin(partial(take, self.best))
        if not self.config.asynchronous:
            self._report(self.saver.settle())

    def finish(self, step: int, take: TakeSnapshot, complete: bool) -> None:
        """Have the state after ``step`` on the disk.

        Raises:
            CheckpointWriteError: it could not be written, and the run is complete, or is to stop then.
        """
        if self.last_step != step:
            self.save(step, take)
        self._report(self.saver.settle())
        if complete and self.last_step != step:
            raise CheckpointWriteError(
                f"{self._problems}\nTraining is complete, but what it came to is not saved. The former checkpoints are "
                "as they were: resume the run once there is room, and it makes the steps after the newest again."
            )

    def _report(self, result: Saved | Failed | None) -> None:
        if isinstance(result, Saved):
            self.reporter.event(
                "checkpoint",
                step=result.step,
                path=f"{result.path.parent.name}/{result.path.name}",
                seconds=round(result.seconds, 3),
                stall_seconds=round(result.stall_seconds, 3),
                bytes=result.num_bytes,
            )
        elif isinstance(result, Failed):
            self.last_step = None
            problems = [str(problem) for problem in result.problems]
            self.reporter.event("checkpoint_failed", step=result.step, problems=problems)
            listed = "\n".join(f"  {problem}" for problem in problems)
            self._problems = f"The checkpoint of step {result.step} could not be written:\n{listed}"
            if self.config.on_failure is OnFailure.stop:
                raise CheckpointWriteError(
                    f"{self._problems}\nThe former ones are as they were. "
                    "checkpoint.on_failure=continue trains on without it."
                )

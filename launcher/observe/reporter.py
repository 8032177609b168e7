"""Rank 0's report of a run, to metrics.jsonl, to the console, and to status.json. Other ranks are silent."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any, Protocol

import torch

from launcher.config.schema import RunConfig
from launcher.observe.console import Console
from launcher.observe.terminal import Terminal
from launcher.rundir import RunDirectory, State, Status
from launcher.rundir.records import open_to_append

__all__ = ["Reporter", "RunFacts", "StepTiming", "build_reporter"]

_STATUS_SECONDS = 1.0


class Numbers(Protocol):
    """What a report needs of a step's numbers; see ``training.outcome.StepNumbers``."""

    @property
    def step(self) -> int: ...
    @property
    def loss(self) -> float: ...
    @property
    def grad_norm(self) -> float: ...
    @property
    def loss_scale(self) -> float: ...
    @property
    def overflow(self) -> bool: ...
    @property
    def rate_factor(self) -> float: ...
    @property
    def applied_steps(self) -> int: ...
    @property
    def stop(self) -> bool: ...
    @property
    def wire_bytes(self) -> int: ...
    @property
    def compression_error(self) -> float | None: ...


@dataclass(frozen=True)
class StepTiming:
    """Wall-clock seconds of a step."""

    step_seconds: float
    data_seconds: float
    """Of these, waiting for data."""


@dataclass(frozen=True)
class RunFacts:
    """What stays the same over an attempt."""

    config: RunConfig
    total_steps: int
    global_batch_size: int
    num_samples: int | None
    """In the training dataset; None where nobody knows."""
    device: torch.device
    hosts: tuple[str, ...]
    """Each rank's."""
    sample_offset: int = 0
    """Samples used up to a step, minus its number times the global batch size."""


class Reporter:
    """Told of everything that happens in a run, and silent about it: every rank's but the first."""

    def step(self, numbers: Numbers, timing: StepTiming) -> None:
        """An optimizer step was attempted."""

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        """The model was validated after ``step``."""

    def event(self, event: str, step: int, **details: Any) -> None:
        """Something else happened: overflow, stop, …"""

    def finish(self, result: dict[str, Any]) -> None:
        """The run has come to its end; ``result`` is what result.json holds."""

    def close(self) -> None:
        """Nothing more will come."""


class RunReporter(Reporter):
    """The first rank's: metrics.jsonl, the console, status.json."""

    def __init__(
        self,
        run: RunDirectory,
        facts: RunFacts,
        console: Console,
        status: Status,
        stopping: Callable[[], bool],
        is_current: Callable[[], bool],
    ) -> None:
        self._run = run
        self._facts = facts
        self._console = console
        self._status = status
        self._status_written = 0.0
        self._has_stepped = False
        self._stopping = stopping
        self._is_current = is_current
        self._file = open_to_append(run.metrics)

    def step(self, numbers: Numbers, timing: StepTiming) -> None:
        """A line, a sign of life on the console, and now and then the status."""
        facts = self._facts
        samples = numbers.step * facts.global_batch_size + facts.sample_offset
        line = {
            "step": numbers.step,
            "applied_steps": numbers.applied_steps,
            "samples": samples,
            "epoch": samples / facts.num_samples if facts.num_samples else None,
            "loss": numbers.loss,
            "grad_norm": numbers.grad_norm,
            "loss_scale": numbers.loss_scale,
            "overflow": numbers.overflow,
            "lr": float(facts.config.optimizer["lr"]) * numbers.rate_factor,
            "step_seconds": timing.step_seconds,
            "data_seconds": timing.data_seconds,
            "samples_per_second": facts.global_batch_size / timing.step_seconds,
            "memory_gib": _memory_gib(facts.device),
            "wire_bytes": numbers.wire_bytes,
        }
        if numbers.compression_error is not None:
            line["compression_error"] = numbers.compression_error
        self._write("train", line)
        if not self._has_stepped and self._is_current():  # what a shorter run had come to is true until now
            self._run.result.unlink(missing_ok=True)
        self._has_stepped = True
        self._console.step(line)
        stopping = numbers.stop or self._stopping()
        if numbers.stop or time.monotonic() - self._status_written > _STATUS_SECONDS:
            self._status_written = time.monotonic()
            state = State.stopping if stopping else State.running
            if self._is_current():
                self._status.now(state, step=numbers.step).write(self._run.status)

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        """A line of its own."""
        self._write("validation", {"step": step, **metrics})
        self._console.validation(step, metrics)

    def event(self, event: str, step: int, **details: Any) -> None:
        """A line of its own."""
        self._write("event", {"event": event, "step": step, **details})
        self._console.event(event, step, details)

    def finish(self, result: dict[str, Any]) -> None:
        """The last words on the console."""
        self._console.finish(result)

    def close(self) -> None:
        """Let go of the console and the file."""
        self._console.close()
        self._file.close()

    def _write(self, kind: str, values: dict[str, Any]) -> None:
        line = {"kind": kind, "attempt": self._status.attempt, **values, "time": time.time()}
        # JSON knows no NaN and no infinity: they become null.
        strict = {
            key: None if isinstance(value, float) and not isfinite(value) else value for key, value in line.items()
        }
        self._file.write(json.dumps(strict) + "\n")


def _memory_gib(device: torch.device) -> float:
    """The peak so far: of the GPU's allocator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def build_reporter(
    run: RunDirectory,
    facts: RunFacts,
    terminal: Terminal | None,
    status: Status,
    stopping: Callable[[], bool] = lambda: False,
    is_current: Callable[[], bool] = lambda: True,
) -> Reporter:
    """The report of the rank that has the terminal; a rank without one is silent.

    Args:
        run: where to report to.
        facts: of this attempt.
        terminal: of the first rank.
        status: to be kept up to date.
        stopping: whether this rank has been asked to stop.
        is_current: False once a later attempt has begun: the status is that one's.
    """
    if terminal is None:
        return Reporter()
    config = facts.config
    console = Console(terminal, config.tracking.console.value, config.name, facts.total_steps, config.train.log_every)
    return RunReporter(run, facts, console, status, stopping, is_current)

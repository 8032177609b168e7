"""Every exception that T-minus raises on purpose, in one tree.

::

    TMinusError
    ├── RequestError (ValueError)      the request was wrong: one message, exit code 2
    │   ├── ConfigurationError         a value, a key, a combination of values
    │   ├── JobError                   the user's job does not fit (a missing method, a bad return value)
    │   ├── CheckpointError            what is to be loaded is damaged, or is not of this model
    │   │   └── DamagedCheckpointError     its content is not what T-minus writes: an older one may be
    │   └── RunError                   a run that was named: unknown, in use, unsafe, or another one than meant
    └── TrainingError (RuntimeError)   the request was right, training failed: exit code 1
        ├── DivergenceError            the numbers cannot be trained on (loss scale at its floor, a NaN loss)
        ├── DesynchronisedError        one rank's state has parted from the others'
        └── CheckpointWriteError       a checkpoint could not be written: the last one, or checkpoint.on_failure=stop

A message names the bad value, the valid ones, and what to do next. Errors that only
a mistake of ours can cause are ``assert`` statements and do not belong here.
"""

from __future__ import annotations

__all__ = [
    "EXIT_FAILED",
    "EXIT_FINISHED",
    "EXIT_REQUEST",
    "EXIT_RESUMABLE",
    "EXIT_UNWRITABLE",
    "CheckpointError",
    "CheckpointWriteError",
    "ConfigurationError",
    "DamagedCheckpointError",
    "DesynchronisedError",
    "DivergenceError",
    "JobError",
    "RequestError",
    "RunError",
    "TMinusError",
    "TrainingError",
]

EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_REQUEST = 2
EXIT_RESUMABLE = 75
"""``EX_TEMPFAIL`` of sysexits.h: stopped on request; the same command may be run again."""

EXIT_UNWRITABLE = 74
"""``EX_IOERR``: a worker, or a task of a job, has failed and could not even write that into its run's directory."""


class TMinusError(Exception):
    """Whatever T-minus raises on purpose."""


class RequestError(TMinusError, ValueError):
    """What was asked for cannot be done as asked; nothing was lost. Shown without a traceback."""


class ConfigurationError(RequestError):
    """A key, a value or a combination of values in the configuration is wrong."""


class JobError(RequestError):
    """The user's job lacks a method, or returned something that it must not."""


class CheckpointError(RequestError):
    """A checkpoint that is to be loaded is damaged, cannot be trusted, or is not of this model."""


class DamagedCheckpointError(CheckpointError):
    """The content of a checkpoint is not what T-minus writes, whatever its digests say.

    Args:
        path: of the checkpoint, or of the file in it.
        reason: what is wrong, without the checkpoint's name.
    """

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path} cannot be loaded: {reason}.")
        self.reason = reason


class RunError(RequestError):
    """A run that was named does not exist, is being written by another launch, is not safe to load, or does not fit."""


class TrainingError(TMinusError, RuntimeError):
    """Training cannot go on."""


class DivergenceError(TrainingError):
    """The numbers cannot be trained on: a loss that is NaN, a loss scale that stays at its floor."""


class DesynchronisedError(TrainingError):
    """A rank's step count, loss scale or schedule has parted from the others'."""


class CheckpointWriteError(TrainingError):
    """A checkpoint could not be written, and it was the run's last, or the run is configured to stop then."""

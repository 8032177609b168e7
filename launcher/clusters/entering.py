"""Entering a run: a new one, or one to go on with; alone, and only if it is safe and the same run."""

from __future__ import annotations

import shlex
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.checkpoint import CheckpointStore
from launcher.checkpoint.safety import writable_by_others
from launcher.clusters.attempts import record_lost_attempts
from launcher.clusters.folders import shown
from launcher.clusters.safety import TRUST, refuse_shared_run
from launcher.clusters.slurm import queue
from launcher.clusters.slurm.queue import QueueError
from launcher.config.differences import Difference, differences, fixed_differences
from launcher.config.files import load_config, to_yaml
from launcher.config.schema import RunConfig
from launcher.errors import RunError
from launcher.rundir import RunDirectory, State, Status, read_json, write_json
from launcher.rundir.access import restrict_umask
from launcher.rundir.cancellation import Cancellation
from launcher.rundir.lock import RunLock
from launcher.rundir.provenance import provenance
from launcher.rundir.records import damaged, drop_cut_line, read_json_lines, recording, write_text

__all__ = ["Entry", "enter", "has_finished"]


@dataclass(frozen=True)
class Entry:
    """A run that this process may launch."""

    run: RunDirectory
    attempt: int
    """The number of the next attempt."""
    changes: tuple[Difference, ...] = ()
    """What has another value than in the attempt before."""
    lock: RunLock | None = None
    """Held; None if the run had finished, and there is nothing to do."""

    @property
    def finished(self) -> bool:
        """Whether the run had come to its end before."""
        return self.lock is None


def enter(
    config: RunConfig, command: Sequence[str], job_may_change: bool = False, state: State = State.running
) -> Entry:
    """Make the run's directory, or go on with the run in ``config.run_dir``.

    Args:
        config: prepared and checked.
        command: the command line, for the record.
        job_may_change: of a run that exists, whether the job's arguments may be others than before.
        state: that the run is in from now on: running, or submitted.

    Raises:
        ConfigurationError: no directory can be made there.
        RunError: another launch writes the run, another user could have, it is not the run of this configuration, or
            nothing can be written there.
    """
    restrict_umask()
    with recording(Path(config.run_dir or config.runs_root)):
        return _enter(config, command, job_may_change, state)


def _enter(config: RunConfig, command: Sequence[str], job_may_change: bool, state: State) -> Entry:
    if config.run_dir is not None and (run := RunDirectory(Path(config.run_dir).absolute())).config.is_file():
        return _go_on(run, config, command, job_may_change, state)
    _check_initial_weights(config)
    run = RunDirectory.create(Path(config.runs_root), config.name, config.run_dir)
    lock = _take(run)
    if run.config.is_file():  # another launch has made the same run in between
        lock.release()
        return _go_on(run, config, command, job_may_change, state)
    try:
        if reason := writable_by_others(run.path):  # a folder of somebody else's, or a file system without modes
            print(f"warning: {reason}: the run will not be gone on with, except by {TRUST}", file=sys.stderr)
        write_text(run.config, to_yaml(config))
        write_json(run.provenance, provenance(command, Path.cwd()))
        Status(state, hosts=_hosts(state)).write(run.status)
    except BaseException:
        lock.release()
        raise
    return Entry(run, attempt=0, lock=lock)


def _go_on(run: RunDirectory, config: RunConfig, command: Sequence[str], job_may_change: bool, state: State) -> Entry:
    refuse_shared_run(run, config.checkpoint.trust_shared_directory)
    _same_run(run, config, job_may_change)  # before anything is written
    if has_finished(run, config):
        return Entry(run, attempt=0)
    _refuse_to_begin_again(run, config)
    if not CheckpointStore(run.checkpoints).candidates():  # it begins
        _check_initial_weights(config)
    asked = _refuse_live_job(run)
    lock = _take(run)
    try:
        if has_finished(run, config):  # while we were looking
            lock.release()
            return Entry(run, attempt=0)
        _refuse_live_job(run, asked)
        before = _same_run(run, config, job_may_change)
        attempt = _next_attempt(run, lock, command, state)
        changes = differences(before, config)
        if changes:
            resolved = replace(config, run_dir=before.run_dir, runs_root=before.runs_root)
            write_text(run.config_from(attempt), to_yaml(resolved))
    except BaseException:
        lock.release()
        raise
    return Entry(run, attempt, tuple(changes), lock)


def _same_run(run: RunDirectory, config: RunConfig, job_may_change: bool) -> RunConfig:
    """The run's configuration so far; raises RunError if ``config`` would make it another run."""
    before = load_config(run.configs()[-1])
    fixed = fixed_differences(before, config, job_may_change)
    if fixed and not _is_void(run):
        lines = [
            f"The run {run.path} cannot go on with this configuration, it would be another run:",
            *(f"  {difference}" for difference in fixed),
            "Repeat the run's own values, or start a new run: leave run_dir out.",
        ]
        raise RunError("\n".join(lines))
    return before


def _is_void(run: RunDirectory) -> bool:
    """Whether a run has failed before it made or saved a step: there is nothing yet that another one could spoil."""
    if not run.status.exists() or Status.read(run.status).state is not State.failed:
        return False
    if CheckpointStore(run.checkpoints).candidates():
        return False
    return not any(line.get("kind") == "train" for line in read_json_lines(run.metrics))


def _refuse_to_begin_again(run: RunDirectory, config: RunConfig) -> None:
    """Raises RunError if the run has checkpoints, and the next attempt would not look at them."""
    newest = CheckpointStore(run.checkpoints).newest_step()
    if not config.checkpoint.enabled and newest is not None:
        raise RunError(
            f"checkpoint.enabled=false: the run {run.path} has a checkpoint of step {newest}, and would begin again "
            "from the first step. Leave checkpoints enabled (checkpoint.every_steps=null checkpoint.every_minutes=null "
            "saves the end alone), or start a new run: leave run_dir out."
        )


def _next_attempt(run: RunDirectory, lock: RunLock, command: Sequence[str], state: State) -> int:
    """Clear up what a killed launch has left, and write down that this one has come."""
    Cancellation.clear(run)
    drop_cut_line(run.metrics)
    drop_cut_line(run.attempts)
    attempt = record_lost_attempts(run, lock.previous) + 1
    _add_provenance(run, attempt, command)
    step = Status.read(run.status).step if run.status.exists() else 0
    Status(state, attempt=attempt, step=step, hosts=_hosts(state)).write(run.status)
    return attempt


def _hosts(state: State) -> tuple[str, ...]:
    """Where the run is launched; of one that is submitted nobody knows yet."""
    return (socket.gethostname(),) if state is State.running else ()


def _refuse_live_job(run: RunDirectory, asked: str | None = None) -> str | None:
    """Raises RunError if SLURM has a job that works, or will work, at the run: one that waits holds no lock.

    Ask before the lock is taken, as a job that works holds it; and again under it, for what another launch has
    submitted while this one waited.

    Args:
        run: the run's directory.
        asked: the job that was asked for before.

    Returns:
        The run's last job.
    """
    job_id = Status.read(run.status).job_id if run.status.exists() else None
    if job_id is None or job_id == asked:
        return job_id
    try:
        job = queue.ask([job_id]).get(job_id)
    except QueueError as error:
        print(f"warning: whether job {job_id} is still there could not be asked ({error})", file=sys.stderr)
        return job_id
    if job is not None and job.is_alive:
        name = shlex.quote(shown(run.path))
        raise RunError(
            f"The run {run.path} is SLURM's {job}: it goes on by itself. To end it: launch cancel {name}; to save "
            "first, and resume it after that: with --save --no-requeue."
        )
    return job_id


def _take(run: RunDirectory) -> RunLock:
    lock = RunLock.take(run)
    if not lock.works:
        print(
            f"warning: the file system of {run.path} has no locks: see to it that no second launch writes there",
            file=sys.stderr,
        )
    return lock


def has_finished(run: RunDirectory, config: RunConfig) -> bool:
    """Whether the run's end has been reached, and no later one is asked for."""
    if not run.result.exists() or Status.read(run.status).state is not State.finished:
        return False
    before = load_config(run.configs()[-1])
    if config.train.max_steps is not None:
        result = read_json(run.result)
        if not isinstance(result, dict) or not isinstance(result.get("step"), int):
            raise damaged(run.result, "it does not say at which step the run has finished")
        return config.train.max_steps <= int(result["step"])
    return before.train.max_epochs is not None and (config.train.max_epochs or 0) <= before.train.max_epochs


def _check_initial_weights(config: RunConfig) -> None:
    weights = config.train.init_from
    if weights is None:
        return
    as_exported = "Give a file of weights as launch export writes it."
    if not Path(weights).is_file():
        there = "that is no file" if Path(weights).exists() else "there is no such file"
        raise RunError(f"train.init_from={weights}: {there}. {as_exported}")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise RunError(
            f"train.init_from={weights} cannot be read as a .safetensors file: {error}. {as_exported} What torch.save "
            "has written, safetensors.torch.save_file makes one of."
        ) from error


def _add_provenance(run: RunDirectory, attempt: int, command: Sequence[str]) -> None:
    """Where this launch comes from, beside what was written down about the first."""
    known: Any = {}
    with suppress(OSError, ValueError):  # what is lost is lost: no reason to stop a run
        known = read_json(run.provenance)
    known = known if isinstance(known, dict) else {}
    resumed = known.get("resumed")
    this = {"attempt": attempt, **provenance(command, Path.cwd())}
    write_json(run.provenance, {**known, "resumed": [*(resumed if isinstance(resumed, list) else []), this]})

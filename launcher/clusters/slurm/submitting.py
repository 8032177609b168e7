"""Sending runs to SLURM: each in its own directory, with the code as it is now; one job, or an array of several."""

from __future__ import annotations

import secrets
import shlex
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.clusters.attempts import take_back
from launcher.clusters.entering import Entry, enter
from launcher.clusters.folders import shown
from launcher.clusters.signals import held_back
from launcher.clusters.slurm import batch, queue
from launcher.clusters.slurm.elements import alive, element, known_elements
from launcher.clusters.slurm.snapshot import take_snapshot
from launcher.config.schema import RunConfig
from launcher.config.sizes import node_range
from launcher.observe.terminal import say
from launcher.rundir import RunDirectory, State, Status, read_json, write_json
from launcher.rundir.records import recording
from launcher.rundir.sweeps import distinctions

__all__ = ["submit", "submit_sweep"]


@dataclass(frozen=True)
class _Sent:
    """A run that is to be submitted, entered and with its folder made."""

    config: RunConfig
    entry: Entry
    before: Status | None
    """Of a run that was there already."""
    folder: Path

    def arguments(self) -> batch.Arguments:
        return (str(self.entry.run.path), self.entry.attempt, str(self.folder), str(Path.cwd()))

    def undo(self) -> None:
        """Nothing was submitted after all."""
        run = self.entry.run
        if self.before is None:
            shutil.rmtree(run.path)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)  # there may have been no room for it
            if not take_back(run, self.entry.attempt):
                self.before.write(run.status)

    def keep(self, why: str) -> None:
        """It may have been submitted: what SLURM would start stays where it is."""
        status = self.before or Status.read(self.entry.run.status)
        status.now(State.resumable, reason=f"it is not known whether it was submitted: {why}").write(
            self.entry.run.status
        )

    def release(self) -> None:
        if self.entry.lock is not None:
            self.entry.lock.release()


def submit(config: RunConfig, command: Sequence[str], job_may_change: bool = False) -> RunDirectory:
    """Submit one run, new or to go on with; returns its directory at once.

    Args:
        config: prepared and checked.
        command: the command line, for the record.
        job_may_change: of a run that exists, whether the job's arguments may be others than before.

    Raises:
        RequestError: the run cannot be entered, the project is too large to copy, or sbatch has refused.
    """
    entry = enter(config, command, job_may_change, State.submitted)
    if entry.lock is None:
        say(f"the run {shown(entry.run.path)} has finished; train.max_steps=N makes it longer")
        return entry.run
    sent = _prepared(config, entry, config.run_dir)
    try:
        (job_id,) = _send([sent], sent.folder, command)
    finally:
        sent.release()
    path = shlex.quote(shown(entry.run.path))
    workers = f"{node_range(config)} node(s) with {config.cluster.processes_per_node} worker(s) each"
    say(f"submitted: job {job_id}, {workers} on {config.device.value}")
    say(f"run: {shown(entry.run.path)}")
    for change in entry.changes:
        say(f"changed: {change.key}: {change.before} → {change.after}")
    say(f"to look at it: launch status {path}; launch logs {path} -f")
    say(f"to end it: launch cancel {path}; to save first, and resume it some day: with --save --no-requeue")
    return entry.run


def submit_sweep(configs: Sequence[RunConfig], command: Sequence[str]) -> list[RunDirectory]:
    """Submit a sweep's runs as one array (for each choice of ``cluster``); those that exist are not made again.

    A run that has finished, waits or is being trained stays as it is; one that has failed or stopped goes on.

    Args:
        configs: prepared and checked, in the sweep's order.
        command: the command line, for the record.

    Returns:
        Each run's directory, in the same order.
    """
    known = known_elements(configs[0])
    at_work = alive(known.values())
    runs: list[RunDirectory] = []
    groups: dict[str, list[_Sent]] = {}
    for config in configs:
        element_id = element(config)
        run = known.get(element_id)
        if run is not None and run.path in at_work:
            say(f"{shown(run.path)}: {at_work[run.path]}")
            runs.append(run)
            continue
        if run is not None:
            config = replace(config, run_dir=str(run.path))  # noqa: PLW2901
        entry = enter(config, command, state=State.submitted)
        runs.append(entry.run)
        if entry.lock is None:
            say(f"{shown(entry.run.path)}: has finished")
            continue
        write_json(entry.run.provenance, {**read_json(entry.run.provenance), "sweep_element": element_id})
        sent = _prepared(config, entry, None if run is None else str(run.path))
        groups.setdefault(repr((config.name, config.cluster)), []).append(sent)
    for group in groups.values():
        folder = Path(group[0].config.runs_root).absolute() / ".sweeps" / f"slurm-{_stamp()}"
        try:
            ids = _send(group, folder, command)
        finally:
            for sent in group:
                sent.release()
        cap = group[0].config.cluster.max_parallel_jobs
        what = "array" if len(ids) > 1 else "job"
        say(f"submitted: {what} {ids[0].partition('_')[0]}, {len(ids)} run(s){f', {cap} at once' if cap else ''}")
        differs = distinctions(runs)
        for sent, job_id in zip(group, ids, strict=True):
            run = sent.entry.run
            say(f"  {shown(run.path)}: job {job_id}  {differs.get(run.path, '')}".rstrip())
    left = len(configs) - sum(map(len, groups.values()))
    say(f"to look at them: launch ls, launch status RUN{f'; {left} left as they are' if left else ''}")
    return runs


def _prepared(config: RunConfig, entry: Entry, run_dir: str | None) -> _Sent:
    run = entry.run
    number = sum(path.is_dir() for path in run.submission.glob("*"))
    folder = run.submission / str(number)
    status = Status.read(run.status)
    existed = run_dir is not None and (entry.attempt > 0 or number > 0)
    before = status.now(State.resumable, reason="could not be submitted again") if existed else None
    sent = _Sent(config, entry, before, folder)
    with recording(run.path):
        try:
            folder.mkdir(parents=True)
        except BaseException:
            sent.undo()
            sent.release()
            raise
    return sent


def _send(group: Sequence[_Sent], folder: Path, command: Sequence[str]) -> list[str]:
    """Copy the project, submit, and write down what was sent; undo all of it if that fails."""
    config = group[0].config
    workdir = Path.cwd()
    ids: list[str] = []
    recorded = False
    with recording(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if config.cluster.snapshot:
                workdir = folder / batch.CODE
                take_snapshot(Path.cwd(), workdir, Path(config.runs_root), config.cluster.snapshot_limit_mib)
            with held_back():  # nothing comes between sbatch and the record of its job
                ids = batch.sbatch(config, folder, workdir, [sent.arguments() for sent in group])
                for sent, job_id in zip(group, ids, strict=True):
                    _record(sent, job_id, folder, workdir, command)
                recorded = True
        except batch.UnknownOutcomeError as error:
            for sent in group:
                sent.keep(str(error))
            raise batch.UnknownOutcomeError(f"{error}. {_how_to_look(group, folder)}") from error
        except KeyboardInterrupt:
            if recorded:
                name = shown(group[0].entry.run.path) if len(group) == 1 else "RUN, for each of its runs"
                say(f"interrupted, but job {ids[0]} is submitted; to end it: launch cancel {name}", error=True)
            else:
                _undo(group, folder)
            raise
        except BaseException:
            if ids:  # a job that nobody would know of
                with suppress(queue.QueueError):
                    queue.cancel(ids[0].partition("_")[0])
            _undo(group, folder)
            raise
    return ids


def _undo(group: Sequence[_Sent], folder: Path) -> None:
    for sent in group:
        sent.undo()
    if folder.exists():
        shutil.rmtree(folder)


def _record(sent: _Sent, job_id: str, folder: Path, workdir: Path, command: Sequence[str]) -> None:
    Status.read(sent.entry.run.status).now(State.submitted, job_id=job_id).write(sent.entry.run.status)
    record = {"job_id": job_id, "command": shlex.join(command), "folder": str(Path.cwd()), "code": str(workdir)}
    write_json(sent.folder / "request.json", {**record, "time": time.time()})
    for script in folder.glob("*_submission.sh"):
        if script.parent != sent.folder:
            shutil.copy2(script, sent.folder)


def _how_to_look(group: Sequence[_Sent], folder: Path) -> str:
    """What to do about a job that may be there."""
    runs = ", ".join(shown(sent.entry.run.path) for sent in group)
    again = f"launch resume {shlex.quote(runs)}" if len(group) == 1 else "the same command"
    return (
        f"The job may be in the queue all the same, so the run is kept: {runs}. When SLURM answers, look with "
        f"squeue --me --name={shlex.quote(group[0].config.name)} --format='%i %T %o': if there is a job with a file in "
        f"{shown(folder)}, end it with scancel ID (it cannot train). Then submit again: {again}."
    )


def _stamp() -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"

"""The runs of a sweep that was submitted before: which they are, and which SLURM still has a job for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from launcher.clusters.slurm import queue
from launcher.config.files import to_yaml
from launcher.config.schema import RunConfig
from launcher.rundir import RunDirectory, Status, read_json
from launcher.rundir.find import all_runs

__all__ = ["alive", "element", "known_elements"]


def element(config: RunConfig) -> str:
    """What makes a sweep's run the same one when the sweep is submitted again: its whole configuration."""
    plain = replace(config, run_dir=None, cluster=replace(config.cluster, max_parallel_jobs=None, wait=False))
    return hashlib.sha256(to_yaml(plain).encode()).hexdigest()


def known_elements(config: RunConfig) -> dict[str, RunDirectory]:
    """The runs that a sweep has made, by what makes them the same."""
    known = {}
    for run in all_runs(Path(config.runs_root)):
        with suppress(OSError, ValueError, KeyError, TypeError):
            known[str(read_json(run.provenance)["sweep_element"])] = run
    return known


def alive(runs: Iterable[RunDirectory]) -> dict[Path, str]:
    """Those that SLURM has a job for, and what it says of it."""
    ids = {}
    for run in runs:
        with suppress(OSError, ValueError, KeyError, TypeError):
            if job_id := Status.read(run.status).job_id:
                ids[run.path] = job_id
    try:
        jobs = queue.ask(ids.values())
    except queue.QueueError:
        return {}
    return {path: str(jobs[job_id]) for path, job_id in ids.items() if job_id in jobs and jobs[job_id].is_alive}

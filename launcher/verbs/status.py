"""``launch status RUN``: what one run is doing, who is at work on it, and why it stands where it stands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.clusters.folders import shown
from launcher.errors import EXIT_FINISHED
from launcher.rundir import RunDirectory, Status
from launcher.rundir.find import find_run
from launcher.verbs.view import CANCELLED, DEAD, View, configured, last_line, views
from launcher.verbs.words import VerbParser, ago

__all__ = ["act", "as_json"]


def act(words: Sequence[str]) -> int:
    """Show a run; returns the exit code.

    Raises:
        RunError: no run is meant, or several.
    """
    parser = VerbParser("status", "Show what a run is doing.")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(list(words))
    (view,) = views([find_run(options.run, Path(options.runs_root))])
    print(json.dumps(as_json(view), indent=2) if options.json else "\n".join(_lines(view)))
    return EXIT_FINISHED


def as_json(view: View) -> dict[str, Any]:
    """What status.json says, and what is known beside it."""
    status, job = view.status, view.job
    return {
        "run": view.name,
        "path": str(view.run.path),
        "condition": view.condition,
        "alive": view.is_alive,
        "state": status.state.value if status is not None else None,
        "attempt": status.attempt if status is not None else None,
        "step": status.step if status is not None else None,
        "nodes": configured(view.run, status.attempt, "cluster", "nodes") if status is not None else None,
        "hosts": list(status.hosts) if status is not None else [],
        "reason": view.explanation,
        "updated": status.updated if status is not None else None,
        "job_id": view.job_id,
        "slurm": None if job is None else {"state": job.state, "reason": job.reason, "nodes": job.nodes},
        "launcher": None if view.launcher is None else {"host": view.launcher.host, "pid": view.launcher.pid},
    }


def _lines(view: View) -> list[str]:
    status = view.status
    lines = [f"run: {shown(view.run.path)}", f"state: {view.condition}"]
    if view.explanation:
        lines[-1] += f": {view.explanation}"
    if status is not None:
        total = configured(view.run, status.attempt, "train", "max_steps")
        lines.append(f"step: {status.step}{f' of {total}' if total else ''}  (attempt {status.attempt})")
        lines += _hosts(view.run, status)
    lines += _numbers(view)
    if view.launcher is not None:
        lines.append(f"launched by: {view.launcher}")
    if view.job_id is not None:
        lines.append(_slurm(view))
    if status is not None:
        lines.append(f"changed: {ago(status.updated)}")
    if view.condition in (CANCELLED, DEAD, "resumable", "failed"):
        lines.append(f"to go on: launch resume {shlex.quote(shown(view.run.path))}")
    return lines


def _numbers(view: View) -> list[str]:
    lines = []
    train = last_line(view.run.metrics, "train")
    if train is not None:
        loss = "not finite" if train["loss"] is None else f"{train['loss']:.4f}"
        lines.append(f"last step: {train['step']}  loss {loss}  {train['step_seconds']:.3g} s a step")
    event = last_line(view.run.metrics, "event")
    if event is not None:
        lines.append(f"last event: {event['event']} at step {event['step']}, {ago(event['time'])}")
    return lines


def _slurm(view: View) -> str:
    if view.job is not None:
        place = f" on {view.job.nodes}" if view.job.nodes else ""
        start = f", expected to start {view.job.starts}" if view.job.state == "PENDING" and view.job.starts else ""
        return f"SLURM: {view.job}{place}{start}"
    why = view.slurm_problem or "it is not in the queue any more"
    return f"SLURM: job {view.job_id}: {why}"


def _hosts(run: RunDirectory, status: Status) -> list[str]:
    """Where the attempt trains, or that it is still to be seen."""
    nodes = configured(run, status.attempt, "cluster", "nodes")
    asked = f"{len(status.hosts)} of cluster.nodes={nodes}: " if isinstance(nodes, str) else ""
    return [f"hosts: {asked}{', '.join(status.hosts)}"] if status.hosts else []

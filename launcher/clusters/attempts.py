"""What is written down about a run from outside its workers: how it was made, how each attempt ended."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.config.files import to_yaml
from launcher.config.schema import RunConfig
from launcher.rundir import RunDirectory, State, Status, append_json_line, write_json
from launcher.rundir.provenance import provenance
from launcher.rundir.records import write_text

__all__ = ["create_run", "end_run", "reported_steps"]


def create_run(config: RunConfig, command: Sequence[str]) -> RunDirectory:
    """A new run directory with all that is known before the first worker starts."""
    run = RunDirectory.create(Path(config.runs_root), config.name, config.run_dir)
    write_text(run.config, to_yaml(config))
    write_json(run.provenance, provenance(command, Path.cwd()))
    Status(State.running, hosts=(socket.gethostname(),)).write(run.status)
    return run


def end_run(run: RunDirectory, attempt: int, started: float, state: State, reason: str | None) -> None:
    """Write down how an attempt, and with it (for now) the run, has ended."""
    steps = reported_steps(run, attempt)
    status = Status.read(run.status)
    status.now(state, attempt=attempt, step=max(steps, default=status.step), reason=reason).write(run.status)
    line = {
        "attempt": attempt,
        "start": started,
        "end": time.time(),
        "first_step": min(steps, default=None),
        "last_step": max(steps, default=None),
        "ended": state.value,
        "reason": reason,
    }
    append_json_line(run.attempts, line)


def reported_steps(run: RunDirectory, attempt: int) -> range:
    """The steps that an attempt has reported, first to last."""
    first = last = 0
    if run.metrics.exists():
        with run.metrics.open(encoding="utf-8") as file:
            for text in file:
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:
                    continue  # a line that a crash has cut
                if line.get("attempt") == attempt and line.get("kind") == "train":
                    first, last = first or line["step"], line["step"]
    return range(first, last + 1) if first else range(0)

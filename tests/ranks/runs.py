"""Runs of the command in a folder of their own, as a user's project has it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Run", "continued", "launch", "resume"]

HERE = Path(__file__).parent
TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class Run:
    """A run that has ended."""

    code: int
    output: str
    directory: Path

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """The lines of a kind in metrics.jsonl."""
        text = (self.directory / "metrics.jsonl").read_text()
        return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.lines("train")]

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.directory / "result.json").read_text())


def launch(folder: Path, *overrides: str, workers: int = 2, job: str = "padded_job") -> Run:
    """``launch`` on a job of this folder, in a new folder of its own below ``folder``."""
    number = len(list(folder.iterdir())) if folder.exists() else 0
    project = folder / f"project {number}"
    project.mkdir(parents=True)
    for name in {"padded_job", job}:
        shutil.copy(HERE / f"{name}.py", project)
    arguments = [f"cluster.processes_per_node={workers}", "run_dir=run", "device=cpu", *overrides]
    completed = subprocess.run(
        [sys.executable, "-m", "launcher", *arguments],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "default"},
    )
    return Run(completed.returncode, completed.stdout + completed.stderr, project / "run")


def continued(run: Run, step: int) -> Path:
    """A copy of a run's project as it was right after the checkpoint of ``step``, results and later ones removed."""
    copy = run.directory.parent.with_name(f"{run.directory.parent.name} from {step} {secrets.token_hex(2)}")
    shutil.copytree(run.directory.parent, copy)
    for checkpoint in (copy / "run" / "checkpoints").iterdir():
        if int(checkpoint.name[5:13]) > step:
            shutil.rmtree(checkpoint)
    (copy / "run" / "result.json").unlink()
    (copy / "run" / "metrics.jsonl").unlink()
    (copy / "run" / "provenance.json").unlink()  # the run is to go on in the copied project, not where it was begun
    return copy / "run"


def resume(directory: Path, *overrides: str, workers: int = 2) -> Run:
    """``launch resume`` with other settings."""
    completed = subprocess.run(
        [sys.executable, "-m", "launcher", "resume", "run", f"cluster.processes_per_node={workers}", *overrides],
        cwd=directory.parent,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "default"},
    )
    return Run(completed.returncode, completed.stdout + completed.stderr, directory)

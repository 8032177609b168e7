"""Runs on the test cluster, submitted as a user does, and what is left of them."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.rundir.records import read_json_lines
from tests.e2e.session import LAUNCH
from tests.slurm.cluster import Cluster, until

__all__ = ["Submitted", "launch", "submit"]

CPU = ("device=cpu", "+experiment=own", "cluster=slurm")
PATIENCE_SECONDS = 240.0
"""A run starts in seconds; on a busy machine, in many."""


@dataclass
class Submitted:
    """A run and its job."""

    cluster: Cluster
    project: Path
    directory: Path
    output: str

    @property
    def status(self) -> dict[str, Any]:
        return json.loads((self.directory / "status.json").read_text())

    @property
    def job_id(self) -> str:
        return self.status["job_id"]

    @property
    def digest(self) -> str:
        return json.loads((self.directory / "result.json").read_text())["parameters_digest"]

    @property
    def attempts(self) -> list[dict[str, Any]]:
        return list(read_json_lines(self.directory / "attempts.jsonl"))

    @property
    def ended(self) -> list[str]:
        return [line["ended"] for line in self.attempts]

    def steps(self, attempt: int | None = None) -> list[int]:
        lines = read_json_lines(self.directory / "metrics.jsonl")
        return [line["step"] for line in lines if line["kind"] == "train" and attempt in (None, line["attempt"])]

    def until_step(self, step: int, attempt: int = 0) -> None:
        until(lambda: max(self.steps(attempt), default=0) >= step, f"step {step} of {self.status}", PATIENCE_SECONDS)

    def until_state(self, *states: str, timeout_seconds: float = PATIENCE_SECONDS) -> None:
        def there() -> bool:
            state = self.status["state"]
            if state not in states and state in ("failed", "finished"):  # between two attempts it is so for a moment
                assert self.cluster.state(self.job_id) in ("RUNNING", "PENDING"), self.told()
            # Rank 0 says that the run has finished; the first node writes down how the attempt has ended after that.
            recorded = state != "finished" or self.ended[-1:] == ["finished"]
            return state in states and recorded

        until(there, f"{states}: {self.status}", timeout_seconds)

    def told(self) -> str:
        """For a failed test."""
        logs = "\n".join(path.read_text()[-3000:] for path in self.directory.glob("submission/*/*.out"))
        return f"{self.status}\n{self.attempts}\n{logs}"


def launch(cluster: Cluster, project: Path, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The command, on the cluster's head."""
    return cluster.run(*LAUNCH, *words, folder=project, check=check, timeout_seconds=PATIENCE_SECONDS)


def submit(cluster: Cluster, project: Path, *overrides: str, run: str = "runs/own/mine") -> Submitted:
    """Submit ``own_job`` to ``run``."""
    done = launch(cluster, project, *CPU, f"run_dir={run}", *overrides)
    return Submitted(cluster, project, project / run, done.stdout)

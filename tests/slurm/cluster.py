"""The test cluster as tests see it: commands on its head, jobs, nodes, and faults."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["TESTCLUSTER", "Cluster", "until"]

TESTCLUSTER = Path(__file__).resolve().parents[2] / "slurm" / "testcluster"
_COMMAND_TIMEOUT_SECONDS = 60.0
_HEAL_TIMEOUT_SECONDS = 60.0
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE"}


def until(condition: Callable[[], Any], what: str, timeout_seconds: float = 60.0) -> None:
    """Wait for a condition; fail with ``what`` if it does not come."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout_seconds:.0f} s: {what}"
        time.sleep(0.1)


class Cluster:
    """A cluster that is up. Nodes are node1, node2 …"""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.prefix = (str(TESTCLUSTER), "run", "--directory", str(directory), "--")
        """Put before a command, runs it on the head; the process is the command's own, and takes its signals."""

    def control(self, verb: str, *arguments: str) -> str:
        """One of testcluster's own commands."""
        words = [str(TESTCLUSTER), verb, "--directory", str(self.directory), *arguments]
        done = subprocess.run(words, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_SECONDS, check=False)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def run(
        self,
        *command: str,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
        check: bool = True,
        timeout_seconds: float = _COMMAND_TIMEOUT_SECONDS,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the head."""
        done = subprocess.run(
            [*self.prefix, *command],
            cwd=folder,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done

    def run_on(self, node: str, *command: str) -> str:
        """Run a command on a node, among its processes."""
        return self.control("run", "--on", node, "--", *command)

    def submit(self, script: str, folder: Path, *options: str) -> int:
        """A batch script's text, without its first line; returns the job's id."""
        path = folder / "job.sh"
        path.write_text(f"#!/bin/bash\n{script}\n")
        return int(self.run("sbatch", "--parsable", *options, str(path), folder=folder).stdout)

    def job(self, job_id: int | str) -> dict[str, str]:
        """SLURM's record of a job, such as JobState, Reason, Restarts, NodeList; of an array, its first element's."""
        lines = self.run("scontrol", "--oneliner", "show", "job", str(job_id)).stdout.splitlines()
        return dict(word.split("=", 1) for word in lines[0].split() if "=" in word)

    def state(self, job_id: int | str) -> str:
        """Such as PENDING, RUNNING, COMPLETED."""
        return self.job(job_id)["JobState"]

    def until_state(self, job_id: int | str, *states: str, timeout_seconds: float = 60.0) -> dict[str, str]:
        """Wait for one of some states; fails at once in another that a job does not leave."""

        def there() -> bool:
            state = self.state(job_id)
            assert state in states or state not in _ENDED, self.job(job_id)
            return state in states

        until(there, f"job {job_id} {' or '.join(states)}", timeout_seconds)
        return self.job(job_id)

    def nodes(self) -> dict[str, dict[str, Any]]:
        """By name: state (SLURM's word), address, power, slurmd, link."""
        return {row["node"]: row for row in json.loads(self.control("status", "--json"))}

    def until_node(self, node: str, *states: str, timeout_seconds: float = 60.0) -> None:
        """Wait until SLURM says one of some states of a node, such as IDLE or DOWN*."""
        until(lambda: self.nodes()[node]["state"] in states, f"{node} {' or '.join(states)}", timeout_seconds)

    def heal(self) -> None:
        """No jobs, and every node idle, whatever was done to them."""
        self.run("scancel", "--user=root", "--full")
        for node, row in self.nodes().items():
            if not row["power"]:
                self.control("power-on", node)
            elif not row["link"]:
                self.control("link-up", node)
            if row["power"] and not row["slurmd"]:
                self.control("restart-slurmd", node)

        def healed() -> bool:
            states = {node: row["state"] for node, row in self.nodes().items()}
            for node in [node for node, state in states.items() if state.startswith(("DOWN", "DRAIN"))]:
                self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
            return set(states.values()) == {"IDLE"}

        until(healed, "all nodes idle", _HEAL_TIMEOUT_SECONDS)


def up(directory: Path, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Start a cluster that ends with this process, however that ends."""
    words = [str(TESTCLUSTER), "up", "--directory", str(directory), f"--while-alive={os.getpid()}", *options]
    return subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)


def down(directory: Path) -> None:
    """Remove it."""
    subprocess.run([str(TESTCLUSTER), "down", "--directory", str(directory)], timeout=60, check=True)

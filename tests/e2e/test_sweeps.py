"""``launch -m``: one run for each value, one after the other."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.e2e.session import LAUNCH, Command

Start = Callable[..., Command]


def states(project: Path) -> list[str]:
    runs = sorted((project / "runs" / "own").iterdir(), key=lambda run: (run / "config.yaml").stat().st_mtime)
    return [json.loads((run / "status.json").read_text())["state"] for run in runs]


def test_a_sweep_goes_on_after_a_run_that_fails(start: Start, project: Path) -> None:
    command = start(["-m", "+experiment=own", "job.fail=nothing,raise", "optimizer.lr=1e-2,1e-3"], project)
    assert command.wait() == 1
    assert states(project) == ["finished", "finished", "failed", "failed"]
    rates = {
        line.split()[1]
        for run in (project / "runs" / "own").iterdir()
        for line in (run / "config.yaml").read_text().splitlines()
        if line.startswith("  lr:")
    }
    assert rates == {"0.01", "0.001"}
    listed = subprocess.run([*LAUNCH, "ls"], cwd=project, capture_output=True, text=True, check=True).stdout
    assert "SWEEP" in listed
    for words in ("job.fail=nothing optimizer.lr=0.01 ", "job.fail=raise optimizer.lr=0.001 "):
        assert listed.count(words) == 1, listed


def test_a_sweep_with_a_wrong_run_does_not_start(start: Start, project: Path) -> None:
    command = start(["-m", "+experiment=own", "train.global_batch_size=8,7"], project)
    assert command.wait() == 2
    assert "In the sweep's run" in command.errors
    assert "global_batch_size=7" in command.errors
    assert not (project / "runs" / "own").exists()


def test_ctrl_c_ends_the_sweep(start: Start, project: Path) -> None:
    arguments = ["-m", "+experiment=own", "train.max_steps=9999", "job.sleep=0.02", "seed=1,2"]
    command = start(arguments, project)
    command.until(lambda: command.steps() > 3)
    command.send_all(signal.SIGINT)
    assert command.wait() == 75
    assert states(project) == ["resumable"]

"""What a run that was stopped leaves: every record names the same last step, whoever was asked to stop."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.session import Command
from tests.e2e.test_failures import workers

Start = Callable[..., Command]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("number", "whom"),
    [(signal.SIGUSR2, "all"), (signal.SIGINT, "all"), (signal.SIGTERM, "rank 1")],
)
def test_all_records_of_a_stop_name_one_step(start: Start, project: Path, number: signal.Signals, whom: str) -> None:
    """A scheduler's signal reaches every process, data workers too, which must not die of it."""
    options = ["train.max_steps=100000", "job.sleep=0.02", "train.num_data_workers=1"]
    command = start(["+experiment=own", *options], project)
    command.until(lambda: command.steps() > 3)
    if whom == "all":
        command.send_all(number)
        asked = number.name
    else:
        os.kill(workers(command)[1], number)
        asked = "a signal to a worker"
    assert command.wait() == 75, command.errors
    assert "Traceback" not in command.output + command.errors
    run = command.run_directory()
    written = lines(run / "metrics.jsonl")
    steps = [line["step"] for line in written if line["kind"] == "train"]
    assert steps == list(range(1, steps[-1] + 1))
    stops = [line["step"] for line in written if line["kind"] == "event" and line["event"] == "stop"]
    assert stops == [steps[-1]]
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("resumable", steps[-1])
    assert status["reason"] == f"stopped on request ({asked}) after step {steps[-1]}"
    assert [(line["last_step"], line["ended"]) for line in lines(run / "attempts.jsonl")] == [(steps[-1], "resumable")]
    assert not (run / "result.json").exists()

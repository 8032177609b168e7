"""Requests to stop, polite and not."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.session import Command, survivors

Start = Callable[..., Command]
LONG = ["+experiment=own", "train.max_steps=10000", "job.sleep=0.02"]


def state(command: Command) -> str:
    return json.loads((command.run_directory() / "status.json").read_text())["state"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_request_to_stop_ends_all_ranks_after_one_step(start: Start, project: Path, number: signal.Signals) -> None:
    command = start(LONG, project)
    command.until(lambda: command.steps() > 3)
    (command.send_all if number is signal.SIGINT else command.send)(number)
    assert command.wait() == 75
    assert state(command) == "resumable"
    logs = command.run_directory() / "logs" / "attempt-0"
    calls = {path.name: path.read_text().count("says call") for path in logs.glob("rank-*.log")}
    assert len(set(calls.values())) == 1, calls
    assert f"stopped on request ({number.name})" in command.output
    assert "Traceback" not in command.output + command.errors


@pytest.mark.parametrize("seconds", [0.2, 0.8, 1.6, 2.4, 3.2])
def test_ctrl_c_while_starting_up_is_kept(start: Start, project: Path, seconds: float) -> None:
    command = start(LONG, project)
    time.sleep(seconds)
    command.send_all(signal.SIGINT)
    code = command.wait()
    # In the first moments Python itself is still starting, and dies of the signal as any program does.
    assert code == 75 or (seconds < 0.5 and code in (-signal.SIGINT, 130, 1)), (code, command.errors)
    if seconds > 0.5:
        assert "Traceback" not in command.output + command.errors


def test_a_second_request_ends_a_command_that_hangs_while_it_starts_up(start: Start, project: Path) -> None:
    (project / "own_job.py").write_text("import time; open('importing', 'w').close(); time.sleep(600)")
    command = start(LONG, project)
    command.until((project / "importing").exists)
    command.send(signal.SIGTERM)
    time.sleep(0.5)
    command.until(lambda: True)
    command.send(signal.SIGINT)
    assert command.wait() == 75
    assert command.errors == "launch: interrupted before training began\n"
    assert not (project / "runs").exists()


def test_a_second_ctrl_c_ends_it_at_once(start: Start, project: Path) -> None:
    command = start([*LONG, "job.sleep=20"], project)
    command.until(lambda: (project / "runs").exists())
    time.sleep(4)
    started = time.monotonic()
    command.send_all(signal.SIGINT)
    time.sleep(0.3)
    command.send_all(signal.SIGINT)
    assert command.wait() == 75
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("data_workers", [0, 2])
def test_workers_do_not_outlive_a_launcher_that_is_killed(start: Start, project: Path, data_workers: int) -> None:
    command = start([*LONG, f"train.num_data_workers={data_workers}"], project)
    command.until(lambda: command.steps() > 2)
    assert len(survivors(command.pid)) >= 3
    command.send(signal.SIGKILL)
    command.wait()
    deadline = time.monotonic() + 8
    while survivors(command.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not survivors(command.pid)

"""``launch ls``, ``status``, ``logs`` and ``cancel``, from another terminal while a run goes on, and after it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.rundir import RunDirectory, State, Status
from tests.e2e.session import LAUNCH, Command

Start = Callable[..., Command]
LONG = ["+experiment=own", "run_dir=runs/own/mine", "train.max_steps=10000", "job.sleep=0.02"]


def launch(project: Path, *words: str) -> tuple[int, str, str]:
    done = subprocess.run([*LAUNCH, *words], cwd=project, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


def status(project: Path, run: str = "mine") -> dict[str, Any]:
    code, output, errors = launch(project, "status", run, "--json")
    assert code == 0, errors
    return json.loads(output)


def test_a_run_is_seen_and_cancelled_from_another_terminal(start: Start, project: Path) -> None:
    command = start(LONG, project)
    command.until(lambda: command.steps() > 60)
    seen = status(project)
    assert seen["alive"] is True
    assert (seen["condition"], seen["launcher"]["pid"]) == ("running", command.pid)
    assert seen["step"] > 0
    code, output, _ = launch(project, "ls")
    assert code == 0
    assert "own/mine" in output
    assert "running" in output
    code, output, _ = launch(project, "status", "latest")
    assert f"launched by: process {command.pid}" in output
    assert "of 10000" in output
    code, output, errors = launch(project, "cancel", "mine", "--save")
    assert code == 0, errors
    assert "is resumable: stopped on request (cancelled by" in output
    assert command.wait() == 75
    assert list((project / "runs/own/mine/checkpoints").glob("step-*"))
    code, _, errors = launch(project, "cancel", "mine")
    assert code == 2
    assert "Nobody is at work on the run" in errors


def test_cancel_ends_a_run_at_once_and_for_good(start: Start, project: Path) -> None:
    command = start([*LONG, "cluster.max_restarts=3"], project)
    command.until(lambda: command.steps() > 5)
    code, output, errors = launch(project, "cancel", "mine")
    assert code == 0, errors
    assert "is failed: cancelled by" in output
    assert command.wait() == 1
    assert "Traceback" not in command.output + command.errors
    assert not (project / "runs/own/mine/checkpoints").exists() or not list(
        (project / "runs/own/mine/checkpoints").glob("step-*")
    )
    again = start(["resume", "mine", "train.max_steps=3"], project)
    assert again.wait() == 0, again.errors  # what was asked of the launch before does not concern this one
    assert status(project)["condition"] == "finished"


def test_a_launcher_that_was_killed_is_not_taken_for_a_running_one(start: Start, project: Path) -> None:
    command = start(LONG, project)
    command.until(lambda: command.steps() > 5)
    command.send(signal.SIGKILL)
    command.wait()
    seen = status(project)
    assert (seen["state"], seen["condition"], seen["alive"]) == ("running", "dead", False)
    assert "ended without a word" in seen["reason"]
    assert "dead" in launch(project, "ls")[1]
    assert "to go on: launch resume runs/own/mine" in launch(project, "status", "mine")[1]
    assert launch(project, "cancel", "mine")[0] == 2


def test_logs_of_one_rank_of_all_and_of_an_earlier_attempt(start: Start, project: Path) -> None:
    command = start(["+experiment=own", "run_dir=runs/own/mine", "train.max_steps=3"], project)
    assert command.wait() == 0
    assert start(["resume", "mine", "train.max_steps=5"], project).wait() == 0
    code, output, errors = launch(project, "logs", "mine", "--rank", "1", "--attempt", "0")
    assert code == 0, errors
    assert output == (project / "runs/own/mine/logs/attempt-0/rank-1.log").read_text()
    code, output, _ = launch(project, "logs", "mine")
    calls = [line for line in output.splitlines() if "says call" in line]
    ranks = {line.partition("]")[0].split()[-1] for line in calls}
    assert ranks == {"0", "1"}
    assert all(f"[{os.uname().nodename} rank " in line for line in calls)
    logs = (project / "runs/own/mine/logs/attempt-1").glob("rank-*.log")
    assert len(calls) == sum(path.read_text().count("says call") for path in logs)
    for words, named in ((["--rank", "7"], "There are: 0, 1"), (["--attempt", "9"], "There are: 0, 1")):
        code, _, errors = launch(project, "logs", "mine", *words)
        assert code == 2
        assert named in errors


def test_logs_are_followed_until_the_run_ends(start: Start, project: Path) -> None:
    command = start([*LONG, "train.max_steps=100"], project)
    command.until(lambda: command.steps() > 2)
    follower = start(["logs", "mine", "-f", "--rank", "0"], project)
    assert command.wait() == 0
    assert follower.wait() == 0
    assert follower.output == (project / "runs/own/mine/logs/attempt-0/rank-0.log").read_text()


def test_looking_does_not_disturb_a_launch(start: Start, project: Path) -> None:
    """Whoever looks holds the run's lock for a moment; a launch that comes then is not refused."""
    assert start(["+experiment=own", "run_dir=runs/own/mine", "train.max_steps=2"], project).wait() == 0
    looking = "\n".join(
        [
            "from pathlib import Path",
            "from launcher.rundir import RunDirectory",
            "from launcher.rundir.lock import is_launched",
            "while True: is_launched(RunDirectory(Path('runs/own/mine')))",
        ]
    )
    watcher = start(["-c", looking], project, (sys.executable,))
    time.sleep(0.3)
    command = start(["resume", "mine", "train.max_steps=4"], project)
    code = command.wait()
    watcher.send(signal.SIGKILL)
    watcher.wait()
    assert code == 0, command.errors


def test_a_reader_that_has_seen_enough_gets_no_traceback(project: Path) -> None:
    run = RunDirectory.create(project / "runs", "own", None)
    Status(State.finished).write(run.status)
    run.config.write_text("name: own\n")
    done = subprocess.run(
        [
            "bash",
            "-c",
            '(sleep 1; exec "$@") | true; echo "${PIPESTATUS[0]}"',
            "bash",
            *LAUNCH,
            "status",
            str(run.path),
        ],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "0\n", done
    assert done.stderr == ""


@pytest.mark.parametrize("words", [["ls"], ["status", "latest"], ["logs", "latest"], ["cancel", "latest"]])
def test_the_verbs_need_neither_torch_nor_hydra(project: Path, words: list[str]) -> None:
    code, output, _ = launch(project, words[0], "--help")
    assert code == 0
    assert f"usage: launch {words[0]}" in output
    program = (
        "import sys; from launcher.cli import main; main(sys.argv[1:]); "
        "print(sorted({'torch', 'hydra', 'omegaconf', 'submitit'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=project, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.splitlines()[-1] == "[]", done

"""A run that was stopped or killed comes back and ends as if nothing had happened: same weights, same losses."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import make_project
from tests.e2e.session import Command, survivors
from tests.e2e.test_failures import workers
from tests.e2e.test_runs import json_lines

Start = Callable[..., Command]
RUN = [
    *("+experiment=own", "run_dir=mine", "train.max_steps=60", "job.sleep=0.02", "train.max_grad_norm=1.0"),
    *("schedule=cosine", "checkpoint.every_steps=7"),
]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's directory when nothing happens to it."""
    project = make_project(tmp_path_factory.mktemp("straight") / "project")
    command = Command(RUN, project)
    assert command.wait() == 0, command.errors
    return project / "mine"


def curve(run: Path) -> dict[int, tuple[float, ...]]:
    """Each step's numbers; of a step that was replayed, the later ones."""
    lines = [line for line in json_lines(run / "metrics.jsonl") if line["kind"] == "train"]
    return {line["step"]: (line["loss"], line["grad_norm"], line["lr"], line["applied_steps"]) for line in lines}


def assert_same_run(run: Path, straight: Path) -> None:
    results = [json.loads((folder / "result.json").read_text()) for folder in (run, straight)]
    assert results[0]["parameters_digest"] == results[1]["parameters_digest"]
    assert results[0]["validation"] == results[1]["validation"]
    assert curve(run) == curve(straight)


def until_step(command: Command, run: Path, step: int) -> None:
    def reached() -> bool:
        try:
            return f'"step": {step},' in (run / "metrics.jsonl").read_text()
        except OSError:
            return False

    command.until(reached)


def ended(run: Path) -> list[str]:
    return [line["ended"] for line in json_lines(run / "attempts.jsonl")]


def events(run: Path, kind: str) -> list[dict]:
    return [line for line in json_lines(run / "metrics.jsonl") if line.get("event") == kind]


def test_the_same_command_goes_on_after_a_stop(start: Start, project: Path, straight: Path) -> None:
    run = project / "mine"
    command = start(RUN, project)
    until_step(command, run, 11)
    command.send(signal.SIGTERM)
    assert command.wait() == 75
    (stop,) = events(run, "stop")
    assert f"to go on, from the checkpoint of step {stop['step']}: launch resume mine" in command.output
    assert not (run / "result.json").exists()
    command = start(RUN, project)
    assert command.wait() == 0, command.errors
    assert "attempt 1" in command.output
    assert_same_run(run, straight)
    assert ended(run) == ["resumable", "finished"]
    steps = [(line["attempt"], line["step"]) for line in json_lines(run / "metrics.jsonl") if line["kind"] == "train"]
    assert steps == [(0 if step <= stop["step"] else 1, step) for step in range(1, 61)]


def test_a_killed_worker_is_replaced_in_the_same_launch(start: Start, project: Path, straight: Path) -> None:
    run = project / "mine"
    command = start([*RUN, "cluster.max_restarts=1"], project)
    until_step(command, run, 17)
    os.kill(workers(command)[1], signal.SIGKILL)
    assert command.wait() == 0, command.errors
    assert "The worker was killed by SIGKILL." in command.errors
    assert_same_run(run, straight)
    assert ended(run) == ["failed", "finished"]
    (restart,) = events(run, "restart")
    assert (restart["attempt"], restart["step"]) == (1, 14)
    assert "restarting: attempt 1, from the checkpoint of step 14" in command.output


def test_everything_killed_and_resumed_twice(start: Start, project: Path, straight: Path) -> None:
    options = [option for option in RUN if not option.startswith("run_dir")]
    command = start(options, project)
    command.until(lambda: command.steps() > 0)
    run = command.run_directory()
    for attempt, step in ((0, 9), (1, 23)):
        until_step(command, run, step)
        for pid in survivors(command.pid):
            os.kill(pid, signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL
        assert json.loads((run / "status.json").read_text())["attempt"] == attempt
        command = start(["resume", "latest"], project)
    assert command.wait() == 0, command.errors
    assert_same_run(run, straight)
    assert ended(run) == ["killed", "killed", "finished"]
    assert [line["last_step"] for line in json_lines(run / "attempts.jsonl")][-1] == 60


def test_a_killed_launcher_leaves_no_worker_that_could_write(start: Start, project: Path, straight: Path) -> None:
    """The next launch begins at once, and waits for them."""
    run = project / "mine"
    command = start(RUN, project)
    until_step(command, run, 9)
    old = set(workers(command).values())
    command.send(signal.SIGKILL)
    again = start(RUN, project)
    command.wait()
    again.until(lambda: (run / "logs" / "attempt-1").exists())
    assert not old & set(survivors(command.pid))
    assert again.wait() == 0, again.errors
    assert_same_run(run, straight)


def test_after_a_second_ctrl_c_nothing_is_left_and_the_run_goes_on(start: Start, project: Path, straight: Path) -> None:
    run = project / "mine"
    slow = [option if not option.startswith("job.sleep") else "job.sleep=0.2" for option in RUN]
    command = start([*slow, "checkpoint.every_steps=2"], project)
    until_step(command, run, 5)
    command.send_all(signal.SIGINT)
    time.sleep(0.05)
    sent = time.monotonic()
    command.send_all(signal.SIGINT)
    assert command.wait() == 75
    assert time.monotonic() - sent < 5
    assert survivors(command.pid) == []
    assert "launch resume mine" in command.output
    assert json.loads((run / "status.json").read_text())["state"] == "resumable"
    command = start(["resume", "mine", "job.sleep=0.0"], project)
    assert command.wait() == 0, command.errors
    assert_same_run(run, straight)


def test_status_says_that_it_is_stopping(start: Start, project: Path) -> None:
    run = project / "mine"
    command = start([*RUN, "job.sleep=0.5"], project)
    until_step(command, run, 2)
    command.send(signal.SIGTERM)
    command.until(lambda: json.loads((run / "status.json").read_text())["state"] == "stopping")
    assert command.wait() == 75
    assert json.loads((run / "status.json").read_text())["state"] == "resumable"
    assert "stopping after the current step" in command.errors


def test_more_workers_and_another_strategy_go_on_at_the_same_point(start: Start, project: Path, straight: Path) -> None:
    run = project / "mine"
    command = start(RUN, project)
    until_step(command, run, 11)
    command.send(signal.SIGTERM)
    assert command.wait() == 75
    command = start(["resume", "mine", "parallel=fsdp", "cluster.processes_per_node=4"], project)
    assert command.wait() == 0, command.errors
    ours, theirs = curve(run), curve(straight)
    assert ours.keys() == theirs.keys()
    assert [ours[step][0] for step in ours] == pytest.approx([theirs[step][0] for step in ours], rel=1e-4)


def test_restarts_are_counted_anew_from_each_new_checkpoint(start: Start, project: Path) -> None:
    """Every attempt but the last fails with twenty steps behind it."""
    run = project / "mine"
    options = ["job.fail=raise", "job.fail_call=41", "job.sleep=0.0", "train.max_steps=50"]
    saving = ["checkpoint.every_steps=10", "checkpoint.asynchronous=false", "cluster.max_restarts=1"]
    command = start([*RUN, *options, *saving], project)
    assert command.wait() == 0, command.errors
    assert ended(run) == ["failed", "failed", "finished"]
    assert [event["step"] for event in events(run, "restart")] == [20, 40]
    assert json.loads((run / "status.json").read_text())["reason"] is None


def test_a_failure_that_comes_back_without_a_new_checkpoint_ends_the_run_with_the_reason(
    start: Start, project: Path
) -> None:
    run = project / "mine"
    options = ["job.fail=raise", "checkpoint.every_steps=2", "checkpoint.asynchronous=false", "job.fail_call=7"]
    command = start([*RUN, *options], project)
    assert command.wait() == 1
    assert "to go on, from the checkpoint of step 2: launch resume mine" in command.output
    # From step 2 on, the third micro-batch fails: no further checkpoint comes.
    command = start(["resume", "mine", "job.fail_call=3", "cluster.max_restarts=2"], project)
    assert command.wait() == 1
    assert ended(run) == ["failed"] * 4
    reason = json.loads((run / "status.json").read_text())["reason"]
    assert "not restarted: 2 restart(s) have published none newer than step 2" in reason
    assert "boom on purpose" in command.errors.splitlines()[-2]

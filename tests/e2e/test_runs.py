"""Runs that go well: what they leave, and that every way in is the same program."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import make_project
from tests.e2e.session import Command

Start = Callable[..., Command]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "launcher")
TRAIN_FIELDS = {
    *("kind", "attempt", "time", "step", "applied_steps", "samples", "epoch", "loss", "grad_norm", "loss_scale"),
    *("overflow", "lr", "step_seconds", "data_seconds", "samples_per_second", "memory_gib", "wire_bytes"),
}


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in json_lines(run / "metrics.jsonl") if line["kind"] == "train"]


def test_the_demo_trains_and_leaves_a_complete_run(start: Start, tmp_path: Path) -> None:
    command = start(["+experiment=digits"], tmp_path)
    assert command.wait() == 0, command.errors
    run = command.run_directory("digits")
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{4}", run.name)
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    logs = {"logs/attempt-0/rank-0.log", "logs/attempt-0/rank-1.log"}
    expected = {"config.yaml", "provenance.json", "status.json", "attempts.jsonl", "metrics.jsonl", "result.json"}
    kept = {name for name in names if name.startswith("checkpoints/step-00000200/")}
    assert "checkpoints/step-00000200/manifest.json" in kept
    assert names - kept == expected | logs | {"attempt.json", "launcher.lock", "workers.lock"}
    result = json.loads((run / "result.json").read_text())
    assert set(result) == {"state", "step", "loss", "validation", "parameters_digest", "seconds"}
    assert (result["state"], result["step"]) == ("finished", 200)
    assert result["validation"]["accuracy"] >= 0.97
    assert f"accuracy {result['validation']['accuracy']:.4f}" in command.output
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["attempt"]) == ("finished", 200, 0)
    (attempt,) = json_lines(run / "attempts.jsonl")
    assert (attempt["first_step"], attempt["last_step"], attempt["ended"]) == (1, 200, "finished")
    train = [line for line in json_lines(run / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(1, 201))
    assert all(set(line) == TRAIN_FIELDS for line in train)
    assert train[-1]["samples"] == 200 * 128
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["command"].endswith("+experiment=digits")
    assert provenance["versions"]["torch"]
    assert command.errors == ""
    assert "step  10/200" in command.output


def test_launch_and_torchrun_are_the_same_program(start: Start, tmp_path: Path) -> None:
    runs = []
    for name, command in (("launch", None), ("torchrun", TORCHRUN)):
        folder = make_project(tmp_path / name)
        arguments = ["+experiment=own", "precision=fp16"]
        started = start(arguments, folder, command) if command else start(arguments, folder)
        assert started.wait() == 0, started.errors
        assert "finished: step 10" in started.output
        runs.append(started.run_directory())
    assert losses(runs[0]) == losses(runs[1])
    digests = {json.loads((run / "result.json").read_text())["parameters_digest"] for run in runs}
    assert len(digests) == 1
    assert json.loads((runs[1] / "status.json").read_text())["state"] == "finished"


def test_torchrun_shows_one_message_for_a_wrong_request(start: Start, project: Path) -> None:
    command = start(["+experiment=own", "train.max_step=3"], project, TORCHRUN)
    assert command.wait() != 0
    assert command.errors.count("Did you mean 'max_steps'?") == 1
    assert not (project / "runs").exists()


def test_torchrun_shows_the_failing_rank(start: Start, project: Path) -> None:
    command = start(["+experiment=own", "job.fail=raise"], project, TORCHRUN)
    assert command.wait() != 0
    assert command.errors.count("ValueError: boom on purpose") == 1
    assert json.loads((command.run_directory() / "status.json").read_text())["state"] == "failed"


def test_what_rank_0_prints_is_shown_and_what_others_print_is_in_their_logs(start: Start, project: Path) -> None:
    command = start(["+experiment=own", "train.num_data_workers=1"], project)
    assert command.wait() == 0, command.errors
    assert "rank 0 says call 1" in command.output
    assert "rank 1 says" not in command.output
    logs = command.run_directory() / "logs" / "attempt-0"
    assert "rank 1 says call 1" in (logs / "rank-1.log").read_text()
    assert "rank 0 says call 1" in (logs / "rank-0.log").read_text()


def test_data_workers_and_compile_change_nothing(start: Start, tmp_path: Path) -> None:
    curves = []
    for number, options in enumerate(([], ["train.num_data_workers=2"], ["train.compile=true"])):
        command = start(["+experiment=own", *options], make_project(tmp_path / str(number)))
        assert command.wait() == 0, command.errors
        curves.append(losses(command.run_directory()))
    assert curves[0] == curves[1]
    assert curves[2] == pytest.approx(curves[0], rel=1e-5)


def test_two_launches_at_once_get_two_directories(start: Start, project: Path) -> None:
    commands = [start(["+experiment=own"], project) for _ in range(2)]
    assert [command.wait() for command in commands] == [0, 0]
    assert len(list((project / "runs" / "own").iterdir())) == 2


def test_max_epochs_sees_every_sample_of_them(start: Start, project: Path) -> None:
    options = ["train.max_steps=null", "train.max_epochs=2", "train.global_batch_size=12", "runs_root=else where"]
    command = start(["+experiment=own", *options], project)
    assert command.wait() == 0, command.errors
    (run,) = (project / "else where" / "own").iterdir()
    assert len(losses(run)) == 11  # ceil(2 * 64 / 12)

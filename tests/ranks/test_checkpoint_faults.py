"""Whatever breaks at whatever instant, the newest valid checkpoint loads, and the run goes on from it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.checkpoint import CheckpointStore
from launcher.config.schema import Verify
from tests.ranks.runs import Run, launch, resume
from tests.ranks.test_resume import assert_same

pytestmark = pytest.mark.ranks

BASE = (
    "+job._target_=faulty_job.Faulty",
    "train.max_steps=18",
    "train.global_batch_size=24",
    "train.micro_batch_size=12",
    "optimizer.lr=1e-2",
    "checkpoint.every_steps=5",
    "checkpoint.keep=1",
    "checkpoint.asynchronous=false",
)


def faulty(folder: Path, fault: str, rank: int, *overrides: str) -> Run:
    settings = [f"+job.fault={fault}", f"+job.fault_rank={rank}"]
    return launch(folder, *BASE, *settings, *overrides, job="faulty_job")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = launch(tmp_path_factory.mktemp("straight"), *BASE, job="faulty_job")
    assert run.code == 0, run.output
    return run


@pytest.mark.parametrize(
    ("instant", "rank", "left"),
    [
        ("when it begins", 0, 5),
        ("in the data", 1, 5),
        ("in its own file", 0, 5),
        ("in the report", 1, 5),
        ("before the reports are read", 0, 5),
        ("in the metadata", 0, 5),
        ("in the manifest", 0, 5),
        ("before the rename", 0, 5),
        ("after the rename", 0, 10),
        ("removing it", 0, 15),
    ],
)
def test_a_worker_killed_at_any_instant_of_a_save_leaves_a_checkpoint_that_loads(
    tmp_path: Path, straight: Run, instant: str, rank: int, left: int
) -> None:
    killed = faulty(tmp_path, instant, rank)
    assert killed.code == 1
    assert "SIGKILL" in killed.output
    found = CheckpointStore(killed.directory / "checkpoints").newest_valid(Verify.full)
    assert found.checkpoint is not None
    assert (found.checkpoint.step, found.passed_over) == (left, ())
    (killed.directory / "metrics.jsonl").unlink()
    again = resume(killed.directory)
    assert_same(straight, again, after=left)
    names = sorted(path.name for path in (again.directory / "checkpoints").iterdir())
    assert names == ["step-00000018"], "nothing half-written or half-removed is left"


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_full_disk_on_one_rank_is_named_and_the_run_goes_on_with_the_former_checkpoint(
    tmp_path: Path, straight: Run, asynchronous: str
) -> None:
    run = faulty(tmp_path, "full", 1, f"checkpoint.asynchronous={asynchronous}", "checkpoint.keep=9")
    assert_same(straight, run, after=0)
    (failed,) = [line for line in run.lines("event") if line["event"] == "checkpoint_failed"]
    assert failed["step"] == 10
    (problem,) = failed["problems"]
    assert problem.startswith("rank 1: ")
    assert problem.endswith("__1_0.distcp: File too large")
    saved = [line["step"] for line in run.lines("event") if line["event"] == "checkpoint"]
    assert saved == [5, 15, 18]
    assert not (run.directory / "checkpoints" / "step-00000010.partial").exists()


def test_a_run_that_is_to_stop_when_a_save_fails_does_and_says_why(tmp_path: Path) -> None:
    run = faulty(tmp_path, "full", 1, "checkpoint.on_failure=stop")
    assert run.code == 1
    assert "The checkpoint of step 10 could not be written" in run.output
    assert "File too large" in run.output
    assert "Traceback" not in run.output
    assert CheckpointStore(run.directory / "checkpoints").newest_step() == 5


def test_a_run_killed_thrice_at_random_is_the_straight_one(tmp_path: Path, straight: Run) -> None:
    settings = [*BASE, "checkpoint.every_steps=2", "checkpoint.asynchronous=true", "checkpoint.keep=2"]
    project = launch(tmp_path, *settings, "train.max_steps=1", job="faulty_job").directory
    (project / "metrics.jsonl").unlink()
    pause = random.Random(os.environ.get("PYTEST_SEED", "1"))
    for attempt in (1, 2, 3):
        arguments = ["-m", "launcher", "resume", "run", "train.max_steps=18"]
        process = subprocess.Popen([sys.executable, *arguments], cwd=project.parent, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        begun = attempt_has_begun(project, attempt, deadline)
        time.sleep(pause.uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert begun
        time.sleep(0.5)  # the workers die with their parent
        found = CheckpointStore(project / "checkpoints").newest_valid(Verify.full)
        assert found.checkpoint is not None
        assert found.passed_over == ()
    final = resume(project, "train.max_steps=18")
    assert final.code == 0, final.output
    assert final.result["parameters_digest"] == straight.result["parameters_digest"]
    losses = {line["step"]: line["loss"] for line in final.lines("train")}
    assert list(losses.values()) == straight.losses[len(straight.losses) - len(losses) :]


def attempt_has_begun(project: Path, attempt: int, deadline: float) -> bool:
    """Wait until an attempt has made a step."""
    metrics = project / "metrics.jsonl"
    while time.monotonic() < deadline:
        if metrics.exists() and f'"attempt": {attempt}' in metrics.read_text():
            return True
        time.sleep(0.005)
    return False

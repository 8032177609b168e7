"""What ``launch status`` and ``cancel`` say of a job that was cancelled, and when SLURM does not answer."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launcher.errors import RunError
from launcher.rundir import RunDirectory, State, Status
from launcher.rundir.lock import RunLock
from launcher.verbs import cancel, logs
from launcher.verbs.view import View, views

SILENT = "echo 'slurm_load_jobs error: Socket timed out' >&2; exit 1"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run with job 9; ``squeue`` is a script in ``bin``."""
    (tmp_path / "own" / "bin").mkdir(parents=True)
    monkeypatch.setenv("PATH", str(tmp_path / "own" / "bin"), prepend=os.pathsep)
    run = RunDirectory(tmp_path / "own" / "run")
    run.path.mkdir()
    run.config.write_text("name: run\n")
    return run


def squeue_says(run: RunDirectory, script: str) -> None:
    path = run.path.parent / "bin" / "squeue"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def view(run: RunDirectory) -> View:
    return views([run])[0]


@pytest.mark.parametrize(
    ("state", "words"), [(State.submitted, "in the queue (scancel)"), (State.running, "by scancel")]
)
def test_a_job_that_was_cancelled_is_told_from_one_that_has_died(run: RunDirectory, state: State, words: str) -> None:
    squeue_says(run, "echo '9|CANCELLED|ReqNodeNotAvail|N/A|'")
    Status(state, job_id="9").write(run.status)
    assert view(run).condition == "cancelled"
    assert words in str(view(run).explanation)
    squeue_says(run, "echo '9|FAILED|NonZeroExitCode|N/A|'")
    assert view(run).condition == "dead"
    assert "without a word" in str(view(run).explanation)


@pytest.mark.parametrize("state", [State.running, State.stopping, State.resumable])
def test_a_job_that_slurm_has_taken_back_into_its_queue_is_submitted(run: RunDirectory, state: State) -> None:
    """After a lost node nobody is left to write that down."""
    Status(state, job_id="9", reason="stopped on request").write(run.status)
    squeue_says(run, "echo '9|PENDING|BeginTime|N/A|'")
    assert view(run).condition == "submitted"
    assert view(run).explanation == "stopped on request; back in the queue"
    squeue_says(run, "echo '9|COMPLETING|None|N/A|'")
    assert view(run).condition == ("running" if state is State.running else "stopping")


def test_logs_of_a_dead_run_are_not_waited_for(run: RunDirectory) -> None:
    squeue_says(run, "echo '9|FAILED|NonZeroExitCode|N/A|'")
    Status(State.submitted, job_id="9").write(run.status)
    for words in ([], ["-f"]):
        with pytest.raises(RunError, match="has no logs, and none will come: it is dead") as raised:
            logs.act([str(run.path), *words])
        assert "-f" not in str(raised.value)
        assert str(run.submission) in str(raised.value)


@pytest.mark.parametrize("host", [None, "node1"])
def test_cancel_says_that_slurm_does_not_answer_and_sends_nobody_to_a_node(run: RunDirectory, host: str | None) -> None:
    squeue_says(run, SILENT)
    Status(State.running, job_id="9").write(run.status)
    lock = RunLock.take(run)
    if host is None:
        lock.release()
    run.launcher_lock.write_text(json.dumps({"host": host or "x", "pid": 254, "attempt": 0, "started": 1.0}))
    with pytest.raises(RunError, match=r"SLURM does not answer about job 9 .*Socket timed out.*nothing was cancelled"):
        cancel.act([str(run.path)])
    if host is not None:
        lock.release()


def test_cancel_of_a_finished_run_needs_no_answer_of_slurm(run: RunDirectory) -> None:
    squeue_says(run, SILENT)
    Status(State.finished, job_id="9").write(run.status)
    with pytest.raises(RunError, match="nothing to cancel: it is finished"):
        cancel.act([str(run.path)])


@pytest.mark.parametrize("place", ["run/submission/0", "../.sweeps/slurm-1"])
def test_a_job_whose_setup_has_failed_is_dead_with_the_line_named(run: RunDirectory, place: str) -> None:
    squeue_says(run, "echo '9|FAILED|NonZeroExitCode|N/A|'")
    Status(State.submitted, job_id="9").write(run.status)
    log = run.path.parent / place / "9_0_log.out"
    log.parent.mkdir(parents=True)
    log.write_text("cp: no such file\nlaunch: the job was not started: its setup has ended with exit code 1 at: cp x\n")
    assert view(run).explanation == (
        "the job was not started: its setup has ended with exit code 1 at: cp x "
        "(SLURM says: job 9 FAILED (NonZeroExitCode))"
    )

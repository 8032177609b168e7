"""Sending runs to SLURM when something is in the way: what stays, what is undone, and what is said."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.clusters.slurm import batch
from launcher.clusters.slurm.checking import check
from launcher.clusters.slurm.submitting import submit
from launcher.config.schema import RunConfig
from launcher.errors import RequestError, RunError
from launcher.rundir import RunDirectory, State, Status
from tests.unit.configs import good_config

Command = Callable[[str, str], None]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Submitting makes the process's umask stricter."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Puts a shell script in place of one of SLURM's commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr(batch, "_LOOK_SECONDS", 0.0)

    def write(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    write("srun", "exit 1")
    return write


def configured(tmp_path: Path) -> RunConfig:
    return good_config(run_dir=str(tmp_path / "run"), cluster__kind="slurm", cluster__snapshot=False)


TIMED_OUT = "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1"


def test_a_job_that_sbatch_has_not_heard_of_again_is_found_in_the_queue(tmp_path: Path, command: Command) -> None:
    command("sbatch", f'echo "$1" > {tmp_path}/sent; {TIMED_OUT}')
    command("squeue", f'echo "7|/elsewhere/job.sh"; echo "8|$(cat {tmp_path}/sent)"')
    run = submit(configured(tmp_path), ["launch"])
    status = Status.read(run.status)
    assert (status.state, status.job_id) == (State.submitted, "8")
    assert {"8_submitted.pkl", "8_submission.sh"} <= {path.name for path in (run.submission / "0").iterdir()}


@pytest.mark.parametrize("squeue", ["exit 0", "echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1"])
def test_a_job_that_may_be_in_the_queue_keeps_its_run_and_the_user_is_told_how_to_look(
    tmp_path: Path, command: Command, squeue: str
) -> None:
    command("sbatch", TIMED_OUT)
    command("squeue", squeue)
    with pytest.raises(RequestError, match=r"may be in the queue all the same.*squeue --me --name=run .*scancel"):
        submit(configured(tmp_path), ["launch"])
    run = RunDirectory(tmp_path / "run")
    status = Status.read(run.status)
    assert status.state is State.resumable
    assert "not known whether it was submitted: sbatch has had no answer" in str(status.reason)
    command("sbatch", "echo Submitted batch job 9")
    submit(configured(tmp_path), ["launch"])
    assert Status.read(run.status).job_id == "9"
    assert (run.submission / "1" / "9_submitted.pkl").is_file()


def test_a_refusal_undoes_the_run(tmp_path: Path, command: Command) -> None:
    command("sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    with pytest.raises(RequestError, match="sbatch has refused the job: invalid partition specified: x"):
        submit(configured(tmp_path), ["launch"])
    assert not (tmp_path / "run").exists()


def test_an_interrupt_during_sbatch_comes_after_the_job_is_recorded(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    command("sbatch", "kill -INT $PPID; sleep 0.3; echo Submitted batch job 9")
    with pytest.raises(KeyboardInterrupt):
        submit(configured(tmp_path), ["launch"])
    assert Status.read(RunDirectory(tmp_path / "run").status).job_id == "9"
    assert "interrupted, but job 9 is submitted; to end it: launch cancel" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "code", "words"),
    [
        ("Socket timed out on send/recv operation", 1, "SLURM does not answer"),
        ("Unable to contact slurm controller (connect failure)", 1, "SLURM does not answer"),
        ("invalid partition specified: x", 2, "SLURM would refuse it"),
    ],
)
def test_check_tells_a_silent_controller_from_a_refusal(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str], said: str, code: int, words: str
) -> None:
    command("sbatch", f"echo 'sbatch: error: Batch job submission failed: {said}' >&2; exit 1")
    assert check(configured(tmp_path)) == code
    assert words in capsys.readouterr().err


def test_a_full_disk_is_one_message_and_undoes_the_run(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("sbatch", "echo Submitted batch job 9")
    real = batch.sbatch

    def full(*arguments: object) -> object:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        try:
            return real(*arguments)  # type: ignore[arg-type]
        finally:  # before pytest writes to a file of its own
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(batch, "sbatch", full)
    with pytest.raises(RunError, match=r"cannot be written to \(File too large"):
        submit(configured(tmp_path), ["launch"])
    assert not (tmp_path / "run").exists()


def test_a_job_that_could_not_be_written_down_is_cancelled(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("sbatch", "echo Submitted batch job 9")
    command("scancel", f'echo "$@" > {tmp_path}/cancelled')
    real = batch.sbatch

    def full_after(*arguments: object) -> object:
        ids = real(*arguments)  # type: ignore[arg-type]
        (tmp_path / "run" / "status.json").unlink()
        return ids

    monkeypatch.setattr(batch, "sbatch", full_after)
    with pytest.raises(RunError, match="cannot be written to"):
        submit(configured(tmp_path), ["launch"])
    assert (tmp_path / "cancelled").read_text() == "9\n"
    assert not (tmp_path / "run").exists()

"""Runs that fail: what is said last, that it ends soon, and that nothing is left."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.session import Command, survivors

Start = Callable[..., Command]


def attempts(command: Command) -> list[dict]:
    lines = (command.run_directory() / "attempts.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_failing_rank_has_the_last_word(start: Start, project: Path) -> None:
    command = start(["+experiment=own", "job.fail=raise"], project)
    assert command.wait() == 1
    *_, error, last = command.errors.splitlines()
    assert error == "ValueError: boom on purpose"
    log = command.run_directory() / "logs" / "attempt-0" / "rank-1.log"
    assert last == f"rank 1 on {socket.gethostname()} failed; its log: {log}"
    assert "boom on purpose" in log.read_text()
    assert command.errors.count("Traceback") == 1
    status = json.loads((command.run_directory() / "status.json").read_text())
    assert status["state"] == "failed"
    assert status["reason"] == "rank 1: ValueError: boom on purpose"
    assert [line["ended"] for line in attempts(command)] == ["failed"]


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        ("kill", "The worker was killed by SIGKILL."),
        ("exit", "The worker ended with exit code 3 and no Python exception."),
        ("exit0", "The worker ended with exit code 0 before the run was finished"),
        ("segfault", "The worker was killed by SIGSEGV."),
    ],
)
def test_a_worker_that_dies_without_a_word_is_named(start: Start, project: Path, fail: str, message: str) -> None:
    command = start(["+experiment=own", f"job.fail={fail}"], project)
    assert command.wait() == 1
    assert message in command.errors
    assert "rank 1 on" in command.errors.splitlines()[-1]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_that_all_end_early_with_code_0_have_failed(start: Start, project: Path, workers: int) -> None:
    """torch's agent would wait for ever for what they were to return."""
    words = ["job.fail=exit0", "job.fail_rank=-1", f"cluster.processes_per_node={workers}"]
    command = start(["+experiment=own", *words], project)
    assert command.wait() == 1
    assert "with exit code 0 before the run was finished" in command.errors
    status = json.loads((command.run_directory() / "status.json").read_text())
    assert status["reason"].startswith("rank 0: The worker ended with exit code 0")


def test_a_finished_worker_needs_no_room_for_temporary_files(
    start: Start, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(project / "tmp"))
    command = start(["+experiment=own", "job.fail=lose tmp"], project)
    assert command.wait() == 0, command.errors
    assert not (project / "tmp").exists()
    assert [line["ended"] for line in attempts(command)] == ["finished"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_killed_while_it_starts_is_named_and_not_its_peers(start: Start, project: Path, rank: int) -> None:
    """What the peers suffer from it (no store, no connection) is not taken for the cause."""
    command = start(["+experiment=own"], project)
    command.until(lambda: rank in workers(command))
    os.kill(workers(command)[rank], signal.SIGKILL)
    assert command.wait() == 1
    assert "The worker was killed by SIGKILL." in command.errors
    assert command.errors.splitlines()[-1].startswith(f"rank {rank} on ")


def workers(command: Command) -> dict[int, int]:
    """Process ids by rank: the launcher's children that write to a rank's log."""
    found = {}
    for pid in survivors(command.pid):
        try:
            name = Path(os.readlink(f"/proc/{pid}/fd/1")).name
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if name.startswith("rank-") and parent == command.pid:  # data workers share their rank's log
            found[int(name.removeprefix("rank-").removesuffix(".log"))] = pid
    return found


def test_ranks_that_are_busy_elsewhere_are_ended_too(start: Start, project: Path) -> None:
    """Rank 0 sleeps where it would notice nothing for minutes."""
    command = start(["+experiment=own", "job.fail=raise", "job.fail_call=1", "job.fail_rank=1"], project)
    source = (project / "own_job.py").read_text()
    (project / "own_job.py").write_text(source.replace("time.sleep(self.sleep)", "time.sleep(600 if RANK == 0 else 0)"))
    started = time.monotonic()
    assert command.wait() == 1
    assert time.monotonic() - started < 30
    assert "boom on purpose" in command.errors


def test_a_failure_before_the_first_step_is_not_retried(start: Start, project: Path) -> None:
    command = start(["+experiment=own", "job.fail=build", "cluster.max_restarts=3"], project)
    assert command.wait() == 1
    assert len(attempts(command)) == 1


def test_a_failure_in_training_is_retried_in_the_same_run(start: Start, project: Path) -> None:
    command = start(["+experiment=own", "job.fail=raise once", "cluster.max_restarts=1"], project)
    assert command.wait() == 0, command.errors
    assert [line["ended"] for line in attempts(command)] == ["failed", "finished"]
    assert (command.run_directory() / "logs" / "attempt-1" / "rank-0.log").exists()


def test_a_failure_that_comes_back_is_not_retried_forever(start: Start, project: Path) -> None:
    command = start(["+experiment=own", "job.fail=raise", "cluster.max_restarts=1"], project)
    assert command.wait() == 1
    assert len(attempts(command)) == 2


def test_a_job_that_the_engine_cannot_use_is_a_wrong_request(start: Start, project: Path) -> None:
    command = start(["+experiment=own", "job.fail=dataset"], project)
    assert command.wait() == 2
    assert "Own.build_dataset('train') returned None" in command.errors
    assert "Traceback" not in command.errors

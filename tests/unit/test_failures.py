"""Of several ranks' failures, the one that caused the others is told."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest

from launcher.errors import EXIT_FAILED, EXIT_REQUEST, DivergenceError, JobError
from launcher.rundir import RunDirectory
from launcher.rundir.failures import Failure, first_failure


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path)
    directory.attempt_logs(0).mkdir(parents=True)
    return directory


def failure(rank: int, time: float, consequence: bool = False, killed: bool = False) -> Failure:
    return Failure(rank, "host", "log", f"rank {rank}", time=time, consequence=consequence, killed=killed)


def write(run: RunDirectory, *failures: Failure) -> None:
    for item in failures:
        item.write(run.rank_failure(0, item.rank))


def test_no_failure_is_none(run: RunDirectory) -> None:
    assert first_failure(run, 0) is None
    write(run, failure(0, 1.0))
    assert first_failure(run, 1) is None, "another attempt's"


@pytest.mark.parametrize("order", list(permutations([0, 1, 2])))
def test_the_earliest_cause_comes_first(run: RunDirectory, order: tuple[int, ...]) -> None:
    write(run, *(failure(rank, time=float(place)) for place, rank in enumerate(order)))
    first = first_failure(run, 0)
    assert first is not None
    assert first.rank == order[0]


def test_a_cause_comes_before_an_earlier_consequence(run: RunDirectory) -> None:
    write(run, failure(0, 1.0, consequence=True), failure(1, 2.0))
    first = first_failure(run, 0, silent=[failure(2, 0.0, killed=True)])
    assert first == failure(1, 2.0)


def test_a_silent_death_comes_before_its_consequences(run: RunDirectory) -> None:
    write(run, failure(0, 1.0, consequence=True), failure(1, 2.0, consequence=True))
    first = first_failure(run, 0, silent=[failure(2, 0.0, killed=True)])
    assert first is not None
    assert first.rank == 2


def test_what_a_rank_wrote_counts_more_than_how_it_ended(run: RunDirectory) -> None:
    write(run, failure(0, 1.0, consequence=True))
    assert first_failure(run, 0, silent=[failure(0, 0.0, killed=True)]) == failure(0, 1.0, consequence=True)


def test_a_consequence_alone_is_still_told(run: RunDirectory) -> None:
    write(run, failure(1, 2.0, consequence=True), failure(0, 1.0, consequence=True))
    assert first_failure(run, 0) == failure(0, 1.0, consequence=True)


@pytest.mark.parametrize("text", ["", "{", '{"unknown": 1}', "3"])
def test_a_file_that_a_killed_rank_left_half_written_is_passed_over(run: RunDirectory, text: str) -> None:
    run.rank_failure(0, 0).write_text(text)
    write(run, failure(1, 1.0))
    assert first_failure(run, 0) == failure(1, 1.0)


def told(error: BaseException) -> Failure:
    try:
        raise error
    except BaseException as raised:
        return Failure.of(raised, rank=1, host="node", log=Path("/log"), step=3)


def test_a_crash_is_told_with_its_traceback_and_log() -> None:
    crash = told(ZeroDivisionError("division by zero"))
    assert crash.message == "ZeroDivisionError: division by zero"
    assert "Traceback" in crash.traceback
    assert (crash.exit_code, crash.step, crash.consequence) == (EXIT_FAILED, 3, False)
    assert str(crash).endswith("rank 1 on node failed; its log: /log")
    assert "Traceback" in str(crash)


@pytest.mark.parametrize(("error", "code"), [(JobError("no"), EXIT_REQUEST), (DivergenceError("no"), EXIT_FAILED)])
def test_a_diagnosis_of_ours_is_told_without_a_traceback(error: Exception, code: int) -> None:
    diagnosis = told(error)
    assert (diagnosis.message, diagnosis.traceback, diagnosis.exit_code) == ("no", "", code)
    assert str(diagnosis).startswith("launch: no" if code == EXIT_REQUEST else "no\nrank 1 on node failed")


class DistBackendError(RuntimeError):
    """Stands for torch's, which is made in C++."""


@pytest.mark.parametrize(
    ("error", "consequence"),
    [
        (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError("writev: Connection reset by peer"), True),
        (DistBackendError("NCCL watchdog"), True),
        (RuntimeError("CUDA out of memory"), False),
        (ValueError("connection closed by peer"), False),
    ],
)
def test_a_broken_connection_is_a_consequence(error: Exception, consequence: bool) -> None:
    assert told(error).consequence is consequence


def test_a_reason_is_one_line_of_bounded_length() -> None:
    text = "RuntimeError: Connection closed by peer.\nGLHF!\n  At:\n    a.py(1)" + " and so on" * 100
    reason = Failure(2, "host", "log", text).reason
    assert reason.startswith("rank 2: RuntimeError: Connection closed by peer. GLHF! At: a.py(1) and")
    assert len(reason) < 420

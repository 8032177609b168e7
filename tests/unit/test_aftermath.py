"""What the batch file does once srun has ended: which turns it brings back, and which it leaves as they are."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from launcher.clusters.slurm.aftermath import lines_after, lines_before
from launcher.clusters.slurm.joblog import last_words, lost_words, task_words
from launcher.errors import EXIT_UNWRITABLE
from launcher.rundir import RunDirectory, State, Status
from tests.unit.configs import good_config

KILLED = "echo 'srun: error: node2: task 1: Killed' >&2; (exit 137)"


class Batch:
    """A batch file with a shell command in place of srun, on a node where ``scontrol`` is a script."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = RunDirectory(folder / "a run")
        (self.run.submission / "0").mkdir(parents=True)
        self.log = self.run.submission / "0" / "7_0_log.out"
        self.status(State.submitted)
        (folder / "bin").mkdir()
        self.job_is("RUNNING")

    def status(self, state: State) -> None:
        Status(state, job_id="7").write(self.run.status)

    def job_is(self, state: str) -> None:
        program = self.folder / "bin" / "scontrol"
        shown = f'[ "$2" = show ] && echo "JobId=$4 JobState={state} x" && exit'
        program.write_text(f'#!/bin/sh\n{shown}\necho "$*" >> "{self.folder}/asked"\n')
        program.chmod(0o755)

    def execute(self, srun: str, requeue: bool = True, **environment: str) -> int:
        config = good_config(cluster__kind="slurm", cluster__requeue=requeue, cluster__max_restarts=2)
        text = "\n".join([*lines_before([self.run.path]), srun, *lines_after(config)])
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        variables = {**os.environ, "PATH": path, "SLURM_JOB_ID": "7", **environment}
        with self.log.open("ab") as log:
            return subprocess.run(["bash", "-c", text], env=variables, stdout=log, stderr=log, check=False).returncode

    @property
    def asked(self) -> str:
        asked = self.folder / "asked"
        return asked.read_text().strip() if asked.exists() else ""


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return Batch(tmp_path)


def running(batch: Batch) -> str:
    """The first node has come to an attempt, and then some task is killed."""
    return f"sed -i s/submitted/running/ '{batch.run.status}'; {KILLED}"


def test_a_turn_whose_task_was_killed_is_requeued_and_says_whose(batch: Batch) -> None:
    batch.log.write_text("srun: error: node9: task 0: of an earlier turn\n")
    assert batch.execute(running(batch), SLURM_RESTART_COUNT="5") == 137
    assert batch.asked == "requeue 7"
    assert lost_words(batch.run, "7", 5) == "the launching process on node2 has ended: Killed"
    assert last_words(batch.run, "7") == lost_words(batch.run, "7", 5)
    assert lost_words(batch.run, "7", 4) is None


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "TIMEOUT", "PENDING"])
def test_what_slurm_has_ended_itself_is_left_to_it(batch: Batch, state: str) -> None:
    batch.job_is(state)
    batch.execute(running(batch))
    assert batch.asked == ""


@pytest.mark.parametrize("state", [State.failed, State.finished, State.resumable])
def test_what_the_first_node_has_decided_stays_so(batch: Batch, state: State) -> None:
    batch.status(state)
    assert batch.execute(KILLED) == 137
    assert batch.asked == ""
    assert last_words(batch.run, "7") is None


def test_a_task_that_ends_by_itself_is_no_lost_one(batch: Batch) -> None:
    assert batch.execute("(exit 1)") == 1
    assert batch.execute("true") == 0
    assert batch.asked == ""


def test_a_job_that_may_not_be_requeued_only_says_it(batch: Batch) -> None:
    batch.execute(running(batch), requeue=False)
    assert batch.asked == ""
    assert last_words(batch.run, "7") == "the launching process on node2 has ended: Killed"


def test_what_dies_before_it_comes_to_an_attempt_is_not_tried_for_ever(batch: Batch) -> None:
    batch.execute(KILLED, SLURM_RESTART_COUNT="1")
    assert batch.asked == "requeue 7"
    batch.execute(KILLED, SLURM_RESTART_COUNT="2")
    assert batch.asked == "requeue 7", "not once more"
    assert "not requeued" in batch.log.read_text()


def test_a_full_disk_is_an_exit_code_and_no_reason_to_begin_again(batch: Batch) -> None:
    link = Path(f"{batch.run.status}.probe")
    link.symlink_to("/dev/full")
    assert batch.execute(running(batch)) == EXIT_UNWRITABLE
    assert batch.asked == ""


def test_an_element_of_an_array_is_requeued_by_its_own_name(batch: Batch) -> None:
    batch.execute(running(batch), SLURM_ARRAY_JOB_ID="6", SLURM_ARRAY_TASK_ID="0")
    assert batch.asked == "requeue 6_0"


def test_what_srun_says_of_a_task_is_read_from_this_attempt_alone(batch: Batch) -> None:
    batch.log.write_text("attempt 0 of x, new\nsrun: error: node2: task 1: Killed\nattempt 1 of x, from\n")
    assert task_words(batch.run, "7", "attempt 1 of x") is None
    with batch.log.open("a") as log:
        log.write("srun: error: node[3-4]: tasks 2-3: Out Of Memory\nsrun: error: node1: task 0: Terminated\n")
    said = task_words(batch.run, "7", "attempt 1 of x")
    assert said == "the launching process on node[3-4] has ended: Out Of Memory"

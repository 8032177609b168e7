"""What the batch file does once srun has ended: which turns it brings back, and which it leaves as they are."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from launcher.clusters.slurm.aftermath import lines_after, lines_before
from launcher.clusters.slurm.joblog import last_words, lost_words, task_words
from launcher.clusters.slurm.notes import first_node_problem
from launcher.errors import EXIT_FINISHED, EXIT_RESUMABLE, EXIT_UNWRITABLE
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
        shown = f'[ "$2" = show ] && echo "JobId=$4 JobState={state} Restarts=${{SLURM_RESTART_COUNT:-0}} '
        shown += 'ExcNodeList=node8 x" && exit'
        self._program("scontrol", f'{shown}\necho "$*" >> "{self.folder}/asked"')

    def slurm_has_others(self, others: bool) -> None:
        self._program("sbatch", f'[ "$1 $2" = "--test-only --exclude=node8,node1" ] && exit {0 if others else 1}')

    def _program(self, name: str, text: str) -> None:
        program = self.folder / "bin" / name
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)

    def execute(self, srun: str, requeue: bool = True, **environment: str) -> int:
        config = good_config(cluster__kind="slurm", cluster__requeue=requeue, cluster__max_restarts=2)
        text = "\n".join([*lines_before([self.run.path], self.log.parent), srun, *lines_after(config)])
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        variables = {**os.environ, "PATH": path, "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "node1", **environment}
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
    assert last_words(batch.run, "7") == f"{lost_words(batch.run, '7', 5)}; back in the queue"
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


def test_codes_that_the_first_node_decides_on_are_passed_on(batch: Batch) -> None:
    for code in (EXIT_FINISHED, EXIT_RESUMABLE, EXIT_UNWRITABLE):
        assert batch.execute(f"(exit {code})") == code
    assert batch.asked == ""
    assert last_words(batch.run, "7") is None


def test_a_job_that_may_not_be_requeued_only_says_it(batch: Batch) -> None:
    batch.execute(running(batch), requeue=False)
    assert batch.asked == ""
    assert last_words(batch.run, "7") == "the launching process on node2 has ended: Killed"


def test_what_dies_before_it_comes_to_an_attempt_is_not_tried_for_ever(batch: Batch) -> None:
    for turn in range(5, 8):  # those before have come to one
        batch.execute(KILLED, SLURM_RESTART_COUNT=str(turn))
    assert batch.asked == "requeue 7\nrequeue 7", "not once more: max_restarts=2"
    said = "the launching process on node2 has ended: Killed; not requeued: it has not come to an attempt"
    assert last_words(batch.run, "7") == said


NO_PYTHON = "slurmstepd: error: execve(): /x/python: No such file or directory"
UNSTARTED = f"echo '{NO_PYTHON}\nsrun: error: node1: task 0: Exited with exit code 2' >&2; (exit 143)"


@pytest.mark.parametrize("others", [True, False])
def test_a_node_on_which_no_task_starts_is_left_out_if_slurm_has_others(batch: Batch, others: bool) -> None:
    batch.slurm_has_others(others)
    batch.execute(UNSTARTED)
    assert batch.asked == ("requeue 7\nupdate JobId=7 ExcNodeList=node8,node1" if others else "")
    then = "back in the queue, without node1" if others else "not requeued: SLURM has no other node for it"
    why = f"the launching process on node1 has ended: Exited with exit code 2: {NO_PYTHON}"
    assert last_words(batch.run, "7") == f"{why}; {then}"


def test_a_first_node_that_does_not_come_is_named_and_not_who_has_waited_for_it(batch: Batch) -> None:
    batch.slurm_has_others(True)
    first_node_problem(batch.log.parent, "7", 0).write_text("node1, the first node, did not join the run\n")
    batch.execute("echo 'srun: error: node2: task 1: Exited with exit code 1' >&2; (exit 143)")
    assert batch.asked == "requeue 7\nupdate JobId=7 ExcNodeList=node8,node1"
    assert (
        lost_words(batch.run, "7", 0) == "node1, the first node, did not join the run; back in the queue, without node1"
    )


def test_an_srun_that_starts_nothing_is_quoted(batch: Batch) -> None:
    batch.execute("echo \"srun: unrecognized option '--container-image=x'\" >&2; (exit 255)", requeue=False)
    assert last_words(batch.run, "7") == "srun: unrecognized option '--container-image=x'"
    batch.execute("(exit 1)")
    assert last_words(batch.run, "7") == "srun has ended with exit code 1"
    assert batch.asked == ""


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

"""A node on which the run does not start, the first one or another: it is named, with the reason, and soon; and a batch
file whose shell is killed."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import make_project
from tests.e2e.session import LAUNCH
from tests.slurm.cluster import Cluster, until
from tests.slurm.runs import PATIENCE_SECONDS, Submitted, launch, submit

pytestmark = pytest.mark.timeout(600)
TWO = ("cluster.nodes=2", "cluster.processes_per_node=1", "cluster.rendezvous_timeout_seconds=6")
ELASTIC = ("cluster.nodes=1-2", *TWO[1:])


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "a project")


def seen(run: Submitted) -> dict[str, Any]:
    return json.loads(launch(run.cluster, run.project, "status", str(run.directory), "--json").stdout)


def python_that(project: Path, node: str, does: str) -> str:
    """An interpreter that does something else on one node."""
    program = project / "own_python"
    program.write_text(f'#!/bin/sh\n[ "$SLURMD_NODENAME" = {node} ] && {does}\nexec {LAUNCH[0]} "$@"\n')
    program.chmod(0o755)
    return f"cluster.python='{program}'"


@pytest.fixture
def hidden(cluster: Cluster, project: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a folder that one node does not see."""

    def hide(node: str) -> Path:
        folder = project / "shared"
        folder.mkdir()
        cluster.run_on(node, "mount", "-t", "tmpfs", "none", str(folder))
        return folder

    yield hide
    for node in ("node1", "node2"):
        command = f"umount {shlex.quote(str(project / 'shared'))} 2> /dev/null; true"
        cluster.run_on(node, "sh", "-c", command)


@pytest.mark.parametrize("node", ["node1", "node2"])
def test_an_interpreter_that_is_not_there_leaves_its_node_out(cluster: Cluster, project: Path, node: str) -> None:
    gone = python_that(project, node, "exec /nowhere/python")
    run = submit(cluster, project, *ELASTIC, gone)
    run.until_state("finished")
    assert cluster.job(run.job_id)["ExcNodeList"] == node
    assert run.attempts[-1]["hosts"] == [{"node1": "node2", "node2": "node1"}[node]]


def test_a_first_node_that_does_not_come_is_named_by_the_others(cluster: Cluster, project: Path) -> None:
    began = time.monotonic()
    run = submit(cluster, project, *TWO, python_that(project, "node1", "sleep 300"))
    cluster.until_state(run.job_id, "FAILED", timeout_seconds=PATIENCE_SECONDS)
    assert time.monotonic() - began < 60
    reason = seen(run)["reason"]
    assert "did not join the run: node1 (1 of 2, the first) within 6 s: nothing was heard of it" in reason, run.told()
    assert "not requeued: SLURM has no other node for it" in reason


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ("node1", "node1, its first node, could not open the job's log in the run's directory"),
        ("node2", "node2 (2 of 2): srun could not start its task: "),
    ],
)
def test_a_node_that_does_not_see_the_run_is_named(
    cluster: Cluster, project: Path, hidden: Callable[[str], Path], node: str, words: str
) -> None:
    folder = hidden(node)
    run = submit(cluster, project, *TWO, run=str(folder / "mine"))
    cluster.until_state(run.job_id, "FAILED", timeout_seconds=PATIENCE_SECONDS)
    assert words in seen(run)["reason"], run.told()


def test_a_killed_batch_shell_brings_the_job_back(cluster: Cluster, project: Path) -> None:
    run = submit(cluster, project, *TWO, "train.max_steps=15", "job.sleep=0.2")
    run.until_step(3)
    cluster.run_on("node1", "sh", "-c", "kill -KILL $(pgrep -o -f '^/bin/bash .*[s]lurm_script')")
    until(lambda: cluster.job(run.job_id)["Restarts"] == "1", "requeued", 30)
    run.until_state("finished")
    assert run.ended == ["resumable", "finished"], run.told()
    assert "the shell of the job's batch file was killed" in run.attempts[0]["reason"]
    assert run.attempts[0]["checkpoint"] == run.attempts[0]["last_step"], "saved"


def test_a_killed_batch_shell_of_a_job_that_may_not_be_requeued_is_named(cluster: Cluster, project: Path) -> None:
    stuck = python_that(project, "node1", "sleep 300")
    run = submit(cluster, project, *TWO, stuck, "cluster.requeue=false", "cluster.rendezvous_timeout_seconds=300")
    cluster.until_state(run.job_id, "RUNNING")
    cluster.run_on("node1", "sh", "-c", "sleep 1; kill -KILL $(pgrep -o -f '^/bin/bash .*[s]lurm_script')")
    cluster.until_state(run.job_id, "FAILED", timeout_seconds=60)
    assert "the shell of its batch file was killed on node1" in seen(run)["reason"]

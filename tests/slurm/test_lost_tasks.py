"""The launching process of a node is killed (out of memory, say), while the node itself and its slurmd live on."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import make_project
from tests.e2e.session import LAUNCH
from tests.slurm.cluster import Cluster, until
from tests.slurm.runs import PATIENCE_SECONDS, Submitted, launch, submit

pytestmark = pytest.mark.timeout(600)
STEPS = 40
TWO_BY_TWO = ("cluster.nodes=2", "cluster.processes_per_node=2", f"train.max_steps={STEPS}", "checkpoint.every_steps=5")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of a local run on four workers."""
    project = make_project(tmp_path_factory.mktemp("local") / "project")
    words = ["+experiment=own", "device=cpu", "cluster.processes_per_node=4", f"train.max_steps={STEPS}", "run_dir=run"]
    subprocess.run([*LAUNCH, *words], cwd=project, check=True, capture_output=True, timeout=300)
    return json.loads((project / "run" / "result.json").read_text())["parameters_digest"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "a project")


def kill_task(cluster: Cluster, node: str) -> None:
    """SIGKILL to the process that launches on a node; srun, on the first, has the same words in its command line."""
    pid = cluster.run_on(node, "pgrep", "-o", "-f", "^[^ ]*python[^ ]* .*[s]ubmitit").strip()
    cluster.run_on(node, "kill", "-KILL", pid)


@pytest.mark.parametrize("node", ["node1", "node2"])
def test_a_killed_launching_process_brings_the_job_back(
    cluster: Cluster, project: Path, undisturbed: str, node: str
) -> None:
    run = submit(cluster, project, *TWO_BY_TWO, "job.sleep=0.3")
    run.until_step(8)
    kill_task(cluster, node)
    until(lambda: cluster.job(run.job_id)["Restarts"] == "1", "requeued", 60)
    seen = json.loads(launch(cluster, project, "status", "mine", "--json").stdout)
    assert seen["condition"] == "submitted", seen
    assert "back in the queue" in seen["reason"], seen
    run.until_state("finished")
    assert run.digest == undisturbed
    assert len(run.ended) == 2, run.told()
    assert f"the launching process on {node} has ended: Killed" in run.attempts[0]["reason"], run.told()
    assert run.attempts[1]["first_step"] == run.attempts[0]["checkpoint"] + 1, "from the newest checkpoint"


def test_what_kills_it_each_time_ends_the_run_with_the_reason(cluster: Cluster, project: Path) -> None:
    run = submit(
        cluster, project, *TWO_BY_TWO, "job.sleep=0.3", "cluster.max_restarts=1", "checkpoint.every_steps=1000"
    )
    for turn in range(2):
        run.until_step(3, attempt=turn)
        kill_task(cluster, "node2")
    run.until_state("failed")
    assert "given up: the last 2 attempt(s) have published no newer checkpoint" in run.status["reason"]
    assert "the launching process on node2 has ended: Killed" in run.attempts[-1]["reason"], run.told()
    assert cluster.until_state(run.job_id, "FAILED")["Restarts"] == "2"


def test_a_job_that_may_not_be_requeued_says_who_was_killed(cluster: Cluster, project: Path) -> None:
    run = submit(cluster, project, *TWO_BY_TWO, "job.sleep=0.3", "cluster.requeue=false")
    run.until_step(3)
    kill_task(cluster, "node1")
    cluster.until_state(run.job_id, "FAILED", timeout_seconds=PATIENCE_SECONDS)
    seen = json.loads(launch(cluster, project, "status", "mine", "--json").stdout)
    assert seen["condition"] == "dead"
    assert "the launching process on node1 has ended: Killed" in seen["reason"]
    assert cluster.job(run.job_id)["Restarts"] == "0"


def test_an_element_of_an_array_is_brought_back_alone(cluster: Cluster, project: Path) -> None:
    sweep = ("-m", "+experiment=own", "cluster=slurm", "device=cpu", "cluster.processes_per_node=1", "job.sleep=0.4")
    launch(cluster, project, *sweep, "train.max_steps=20", "checkpoint.every_steps=4", "optimizer.lr=1e-2,1e-3")
    runs = [Submitted(cluster, project, path, "") for path in (project / "runs" / "own").iterdir()]
    (lost,) = [run for run in runs if run.job_id.endswith("_1")]
    lost.until_step(6)
    pid = json.loads((lost.directory / "launcher.lock").read_text())["pid"]
    cluster.run_on(lost.status["hosts"][0], "kill", "-KILL", str(pid))
    for run in runs:
        run.until_state("finished")
        assert len(run.ended) == 1 + (run is lost), run.told()
    assert "has ended: Killed" in lost.attempts[0]["reason"], lost.told()

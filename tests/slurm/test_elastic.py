"""Jobs with a range of nodes: they take what is there each time that they start, and stay the run that they are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.rundir.records import read_json_lines
from tests.e2e.conftest import make_project
from tests.e2e.session import LAUNCH
from tests.slurm.cluster import Cluster, down, until, up
from tests.slurm.runs import Submitted, launch, submit

pytestmark = pytest.mark.timeout(600)
STEPS, BATCH, MICRO, SAMPLES = 40, 8, 2, 64
COUNTED = ("job._target_=counted_job.Counted", f"train.max_steps={STEPS}", "checkpoint.every_steps=5")
ELASTIC = ("cluster.nodes=1-2", "cluster.processes_per_node=2", *COUNTED)
FP32_ROUNDING = 1e-5


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make(tmp_path / "a project")


def make(folder: Path) -> Path:
    project = make_project(folder)
    shutil.copy(Path(__file__).parent / "counted_job.py", project)
    return project


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a local run on four workers."""
    project = make(tmp_path_factory.mktemp("local") / "project")
    words = ["+experiment=own", "device=cpu", "cluster.processes_per_node=4", *COUNTED, "run_dir=run"]
    subprocess.run([*LAUNCH, *words], cwd=project, check=True, capture_output=True, timeout=300)
    return project / "run"


def losses(directory: Path) -> list[float]:
    """Of each step; of one that was made again, the one that counts."""
    lines = [line for line in read_json_lines(directory / "metrics.jsonl") if line["kind"] == "train"]
    assert {line["samples"] - BATCH * line["step"] for line in lines} == {0}, "the global batch stays what it is"
    return [loss for _, loss in sorted({line["step"]: line["loss"] for line in lines}.items())]


def samples_of_step(run: Submitted) -> dict[int, list[int]]:
    """What every rank has said that it has seen, by step; of one that was made again, of the attempt that counts."""
    seen: dict[int, list[int]] = {}
    for line in run.attempts:
        attempt: dict[int, list[int]] = {}
        logs = list((run.directory / "logs" / f"attempt-{line['attempt']}").glob("rank-*.log"))
        each = BATCH // (MICRO * len(logs))
        for log in logs:
            said = [text.split()[1:] for text in log.read_text().splitlines() if text.startswith("samples ")]
            for call, numbers in enumerate(said[: each * (STEPS - line["first_step"] + 1)]):
                attempt.setdefault(line["first_step"] + call // each, []).extend(map(int, numbers))
        seen |= attempt
    return seen


def same_as(run: Submitted, undisturbed: Path) -> None:
    assert losses(run.directory) == pytest.approx(losses(undisturbed), rel=FP32_ROUNDING)
    seen = samples_of_step(run)
    assert list(seen) == list(range(1, STEPS + 1))
    counts = Counter(number for numbers in seen.values() for number in numbers)
    assert counts == dict.fromkeys(range(SAMPLES), STEPS * BATCH // SAMPLES), "every sample once in each epoch"


# What survives a slurmd trains on until SLURM has noticed, half a minute later; what has lost its peers waits.
@pytest.mark.parametrize(("fault", "sleep"), [("kill-slurmd", 1.2), ("power-off", 0.4)])
def test_a_range_loses_a_node_and_goes_on_with_the_rest(
    cluster: Cluster, project: Path, undisturbed: Path, fault: str, sleep: float
) -> None:
    run = submit(cluster, project, *ELASTIC, f"job.sleep={sleep}")
    assert "1-2 node(s) with 2 worker(s) each" in run.output
    until((run.directory / "checkpoints" / "step-00000005").is_dir, "a checkpoint", 240)
    assert "hosts: 2 of cluster.nodes=1-2: node1, node2" in launch(cluster, project, "status", "mine").stdout
    cluster.control(fault, "node2")
    until(lambda: cluster.job(run.job_id)["Restarts"] == "1", "requeued", 90)
    run.until_step(STEPS - 2, attempt=1)
    assert cluster.nodes()["node2"]["state"] == "DOWN*"
    assert "hosts: 1 of cluster.nodes=1-2: node1" in launch(cluster, project, "status", "mine").stdout
    run.until_state("finished")
    assert [line["hosts"] for line in run.attempts] == [["node1", "node2"], ["node1"]], run.told()
    assert run.attempts[1]["first_step"] == run.attempts[0]["checkpoint"] + 1, "from the newest checkpoint"
    same_as(run, undisturbed)


def test_a_node_that_does_not_come_is_left_out(cluster: Cluster, project: Path, undisturbed: Path) -> None:
    slow = project / "slow_python"
    slow.write_text(f'#!/bin/sh\n[ "$SLURMD_NODENAME" = node2 ] && sleep 300\nexec {LAUNCH[0]} "$@"\n')
    slow.chmod(0o755)
    late = (f"cluster.python='{slow}'", "cluster.rendezvous_timeout_seconds=6")
    run = submit(cluster, project, *ELASTIC, *late)
    run.until_state("finished")
    assert [line["hosts"] for line in run.attempts] == [[], ["node1"]], run.told()
    assert "node2 (2 of 2): nothing was heard of it" in run.attempts[0]["reason"]
    assert run.attempts[0]["reason"].endswith("going on without")
    assert cluster.job(run.job_id)["ExcNodeList"] == "node2"
    assert losses(run.directory) == pytest.approx(losses(undisturbed), rel=FP32_ROUNDING)


def test_a_saved_job_takes_the_node_that_has_come_back(cluster: Cluster, project: Path, undisturbed: Path) -> None:
    cluster.run("scontrol", "update", "NodeName=node2", "State=DRAIN", "Reason=test")
    run = submit(cluster, project, *ELASTIC, "job.sleep=0.3")
    run.until_step(8)
    cluster.run("scontrol", "update", "NodeName=node2", "State=RESUME")
    assert "back in the queue" in launch(cluster, project, "cancel", "mine", "--save").stdout
    run.until_state("finished")
    assert [line["hosts"] for line in run.attempts] == [["node1"], ["node1", "node2"]], run.told()
    assert run.ended == ["resumable", "finished"]
    assert run.steps() == list(range(1, STEPS + 1)), "no step twice, none left out"
    same_as(run, undisturbed)


def test_nodes_that_the_batch_does_not_divide_over_stay_idle(
    three_nodes: Cluster, project: Path, undisturbed: Path
) -> None:
    kill = ("job.fail=kill once", "job.fail_rank=3", "job.fail_call=12", "cluster.max_restarts=1")
    run = submit(three_nodes, project, *ELASTIC, "cluster.nodes=1-3", *kill)
    run.until_state("finished")
    assert three_nodes.job(run.job_id)["NumNodes"] == "3"
    assert run.ended == ["failed", "finished"], "restarted in the same allocation"
    assert [line["hosts"] for line in run.attempts] == [["node1", "node2"]] * 2
    assert run.digest == json.loads((undisturbed / "result.json").read_text())["parameters_digest"]
    logs = "".join(path.read_text() for path in run.directory.glob("submission/*/*_0_log.out"))
    assert "2 of 3 nodes, which the global batch divides over" in logs
    assert three_nodes.until_state(run.job_id, "COMPLETED")["ExitCode"] == "0:0"


def test_the_elements_of_a_sweep_have_the_range(cluster: Cluster, project: Path) -> None:
    sweep = ("-m", "+experiment=own", "cluster=slurm", "device=cpu", *ELASTIC, "optimizer.lr=1e-2,1e-3")
    launch(cluster, project, *sweep, "train.max_steps=2", "cluster.max_parallel_jobs=1")
    runs = [Submitted(cluster, project, path, "") for path in (project / "runs" / "own").iterdir()]
    assert len(runs) == 2
    for run in runs:
        run.until_state("finished")
        assert run.attempts[0]["hosts"] == ["node1", "node2"]


def test_check_says_who_shares_the_batch(cluster: Cluster, project: Path) -> None:
    words = ("check", "+experiment=own", "device=cpu", "cluster=slurm", "cluster.processes_per_node=2")
    done = launch(cluster, project, *words, "cluster.nodes=1-3")
    assert "#SBATCH --nodes=1-3\n" in done.stdout
    assert "on 1 node(s): 2 worker(s) on cpu, each 2 micro-batch(es) of 2 in a step" in done.stdout
    assert "on 3 node(s), of which 2 train: 4 worker(s) on cpu" in done.stdout
    assert "of 3 machines 2 will train" in done.stderr


def test_a_stream_is_refused_before_the_number_of_nodes_has_changed(cluster: Cluster, project: Path) -> None:
    stream = "class Stream(torch.utils.data.IterableDataset):\n"
    stream += "    def __iter__(self):\n        return iter([])\n"
    stream += "    def state_dict(self):\n        return {}\n"
    stream += "    def load_state_dict(self, state):\n        pass\n"
    own = (project / "own_job.py").read_text()
    own = own.replace("class Own(", f"{stream}\n\nclass Own(").replace(
        "        inputs = torch.randn",
        "        if split == 'train':\n            return Stream()\n        inputs = torch.randn",
    )
    (project / "own_job.py").write_text(own)
    run = submit(cluster, project, "cluster.nodes=1-2", "cluster.processes_per_node=2")
    run.until_state("failed")
    assert "cluster.nodes=1-2 with an IterableDataset (Stream)" in run.status["reason"], run.told()
    assert run.steps() == []


@pytest.fixture
def three_nodes(session_cluster: Cluster) -> Iterator[Cluster]:
    directory = Path(f"/run/tminus-testcluster-{os.getpid()}-elastic")
    started = up(directory, ["--nodes=3", "--gpus=0"])
    assert started.returncode == 0, started.stderr
    yield Cluster(directory)
    down(directory)

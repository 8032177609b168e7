"""What slurm/ offers to sites does what it says, on a real cluster."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import TESTCLUSTER, Cluster, down, until, up

SLURM = TESTCLUSTER.parent
OWN = Path(__file__).parents[1] / "e2e"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def preflight(cluster: Cluster, folder: Path, nodes: int, before: str = "") -> subprocess.CompletedProcess[str]:
    command = f"{before} exec {sys.executable} {SLURM / 'preflight.py'} --mebibytes 1 --timeout 5"
    words = ("srun", f"--nodes={nodes}", "--ntasks-per-node=1", "bash", "-c", command)
    return cluster.run(*words, folder=folder, environment=ONE_THREAD, check=False, timeout_seconds=120)


def test_preflight_names_the_slow_node(three_nodes: Cluster, tmp_path: Path) -> None:
    checked = preflight(three_nodes, tmp_path, 3)
    assert checked.returncode == 0, checked
    assert "all is well" in checked.stdout
    slower = "tc qdisc replace dev eth0 root tbf rate 50mbit burst 256kb latency 200ms"
    three_nodes.run_on("node3", *slower.split())
    checked = preflight(three_nodes, tmp_path, 3)
    assert checked.returncode == 1, checked
    problems = checked.stdout.partition("all together")[2].splitlines()[1:]
    assert len(problems) == 1, checked.stdout
    assert problems[0].startswith("slow: node3 ")


def test_preflight_names_the_way_that_is_broken(three_nodes: Cluster, tmp_path: Path) -> None:
    three_nodes.run_on("node3", "ip", "route", "add", "blackhole", "10.77.0.2/32")
    checked = preflight(three_nodes, tmp_path, 3)
    assert checked.returncode == 1, checked
    assert "no way between node2 and node3" in checked.stdout, checked.stdout
    assert "node1" not in checked.stdout.splitlines()[-1]


def test_preflight_names_the_missing_node(cluster: Cluster, tmp_path: Path) -> None:
    checked = preflight(cluster, tmp_path, 2, before="[ $(hostname) = node2 ] && exec sleep 15;")
    assert checked.returncode == 1, checked
    assert "missing: node2" in checked.stdout
    assert list(tmp_path.iterdir()) == []


def test_plain_torchrun_stops_is_requeued_and_ends_as_an_undisturbed_run(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    shutil.copy(OWN / "own_job.py", tmp_path)
    shutil.copy(OWN / "own.yaml", tmp_path / "conf" / "experiment")
    environment = {"PYTHON": sys.executable, **ONE_THREAD}
    ends = []
    for disturbed in (False, True):
        run = tmp_path / f"run-{disturbed}"
        words = ["sbatch", "--parsable", "--nodes=2", "--gpus-per-node=1", str(SLURM / "torchrun.sbatch")]
        overrides = ["+experiment=own", "train.max_steps=25", f"job.sleep={0.1 * disturbed}"]
        submitted = cluster.run(*words, *overrides, folder=tmp_path, environment={**environment, "RUN_DIR": str(run)})
        job = int(submitted.stdout)
        if disturbed:
            until((run / "metrics.jsonl").exists, "the first steps")
            cluster.run("scancel", "--batch", "--signal=USR2", str(job))
        cluster.until_state(job, "COMPLETED", timeout_seconds=120)
        assert cluster.job(job)["Restarts"] == str(int(disturbed))
        ends.append(json.loads((run / "result.json").read_text())["parameters_digest"])
    assert ends[0] == ends[1]


@pytest.fixture
def three_nodes(session_cluster: Cluster) -> Iterator[Cluster]:
    directory = Path(f"/run/tminus-testcluster-{os.getpid()}-three")
    started = up(directory, ["--nodes=3", "--gpus=0", "--rate=1gbit"])
    assert started.returncode == 0, started.stderr
    yield Cluster(directory)
    down(directory)

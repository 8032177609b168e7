"""A disk that fills while a job trains on it, its tasks' own logs included."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.errors import EXIT_UNWRITABLE
from tests.e2e.conftest import make_project
from tests.slurm.cluster import Cluster, down, up
from tests.slurm.runs import launch, submit

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def cluster_with_disk(session_cluster: Cluster, small_disk: Path) -> Iterator[Cluster]:
    """A cluster of its own: hosts see what was mounted before them."""
    directory = Path(f"/run/tminus-testcluster-{os.getpid()}-disk")
    started = up(directory, ["--gpus=0"])
    assert started.returncode == 0, started.stderr
    yield Cluster(directory)
    down(directory)


def test_status_says_that_the_disk_was_full_and_the_run_goes_on_once_there_is_room(
    cluster_with_disk: Cluster, small_disk: Path, tmp_path: Path
) -> None:
    cluster, disk = cluster_with_disk, str(small_disk / "mine")
    project = make_project(tmp_path / "a project")
    words = ("cluster.nodes=2", "cluster.processes_per_node=2", "cluster.snapshot=false", "checkpoint.every_steps=5")
    run = submit(cluster, project, *words, "train.max_steps=400", run=disk)
    job = cluster.until_state(run.job_id, "FAILED", timeout_seconds=240)
    assert job["ExitCode"] in (f"{EXIT_UNWRITABLE}:0", "1:0"), run.told()
    assert job["Restarts"] == "0", "a next turn would find the disk as full"
    shown = launch(cluster, project, "status", disk).stdout
    assert "the disk is full" in shown or "No space left" in shown, shown
    assert "without a word" not in shown
    subprocess.run(["mount", "-o", "remount,size=40m", str(small_disk)], check=True)
    launch(cluster, project, "resume", disk)
    run.until_state("finished")
    assert run.steps()[-1] == 400

"""A cluster that binds tasks to their CPUs: what workers have of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import make_project
from tests.slurm.cluster import Cluster, down, up
from tests.slurm.runs import submit

BOUND = """
import os

import torch
from own_job import Own


class Bound(Own):
    def build_model(self):
        print("cores", len(os.sched_getaffinity(0)), "threads", torch.get_num_threads())
        return super().build_model()
"""


@pytest.fixture
def binding_cluster(session_cluster: Cluster) -> Iterator[Cluster]:
    """One node with two CPUs of this machine; there is one wherever there is the session's."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("it takes two CPUs to be bound to one of them")
    directory = Path(f"/run/tminus-binding-{os.getpid()}")
    started = up(directory, ["--nodes=1", "--cpus=2", "--bind-cpus"])
    try:
        assert started.returncode == 0, started.stderr
        yield Cluster(directory)
    finally:
        down(directory)


def test_workers_have_the_cpus_of_their_task(binding_cluster: Cluster, tmp_path: Path) -> None:
    project = make_project(tmp_path / "a project")
    (project / "bound_job.py").write_text(BOUND)
    words = ["job._target_=bound_job.Bound", "cluster.nodes=1", "cluster.memory_gib=0.5", "train.max_steps=2"]
    words += ["cluster.wait=true", "cluster.processes_per_node=1"]
    for cpus in (1, 2):
        run = submit(binding_cluster, project, *words, f"cluster.cpus_per_task={cpus}", run=f"runs/own/{cpus}")
        log = (run.directory / "logs" / "attempt-0" / "rank-0.log").read_text()
        assert f"cores {cpus} threads {cpus}" in log

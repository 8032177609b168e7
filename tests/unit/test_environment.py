"""Importing the package is instant; what the environment says is read from a mapping."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import launcher
from launcher.environment import Ranks, is_torchrun_worker, thread_limit

WORKER = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1"}


def modules_after(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(' '.join(sys.modules))"
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": paths},
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_importing_the_package_imports_neither_torch_nor_hydra() -> None:
    assert not modules_after("import launcher, launcher.cli") & {"torch", "hydra", "omegaconf", "numpy", "yaml", "rich"}


def test_composing_imports_no_torch() -> None:
    assert not modules_after("import launcher.config.compose") & {"torch", "numpy", "rich"}


def test_the_package_offers_what_it_lists() -> None:
    assert sorted(launcher.__all__) == ["Job", "LossOutput", "__version__"]
    assert all(hasattr(launcher, name) for name in launcher.__all__)


def test_ranks_are_read_from_the_agents_variables() -> None:
    ranks = Ranks.from_environment({**WORKER, "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"})
    assert (ranks.rank, ranks.world_size, ranks.local_rank) == (5, 8, 1)
    assert (ranks.local_world_size, ranks.node_rank) == (4, 1)
    assert ranks.host


def test_one_node_is_assumed_where_nothing_is_said() -> None:
    ranks = Ranks.from_environment(WORKER)
    assert (ranks.local_world_size, ranks.node_rank) == (1, 0)


@pytest.mark.parametrize("missing", [None, *WORKER])
def test_a_worker_of_torchrun_has_every_variable(missing: str | None) -> None:
    environment = {name: value for name, value in WORKER.items() if name != missing}
    assert is_torchrun_worker(environment) is (missing is None)


@pytest.mark.parametrize(("cores", "workers", "threads"), [(8, 2, 4), (8, 3, 2), (2, 4, 1), (1, 1, 1)])
def test_workers_share_the_cores_they_may_use(
    cores: int, workers: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    assert thread_limit({}, workers) == threads


def test_the_users_own_thread_count_stands() -> None:
    assert thread_limit({"OMP_NUM_THREADS": "3"}, 2) is None

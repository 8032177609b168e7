"""One real SLURM cluster for the whole session; each test finds it idle and without jobs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, down, up

HERE = Path(__file__).parent
IMPOSSIBLE_HERE = 3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[Cluster]:
    """Two nodes with two GPUs each. Where there can be none, tests are skipped; under CI they fail."""
    # Not below pytest's own folder: a socket's path has 107 bytes at most, and munged wants folders open to all.
    directory = Path(f"/run/tminus-testcluster-{os.getpid()}")
    started = up(directory)
    if started.returncode == IMPOSSIBLE_HERE and "CI" not in os.environ:
        pytest.skip(started.stderr.strip())
    if started.returncode != 0:
        pytest.fail(started.stderr.strip())
    try:
        yield Cluster(directory)
    finally:
        down(directory)


@pytest.fixture
def cluster(session_cluster: Cluster) -> Iterator[Cluster]:
    """The session's cluster; whatever a test did to it is undone afterwards."""
    yield session_cluster
    session_cluster.heal()

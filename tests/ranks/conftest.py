"""Pools of ranks, one for each number of them, for a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks.processes import Ranks


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, Ranks]]:
    """By world size; processes start when one is first used."""
    found = {world_size: Ranks(world_size) for world_size in (1, 2, 3, 4)}
    yield found
    for ranks in found.values():
        ranks.stop()

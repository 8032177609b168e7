"""An attempt that is no longer the current one publishes nothing; attempts without progress are counted."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from launcher.checkpoint import CheckpointStore
from launcher.clusters.progress import lost_in_a_row
from launcher.rundir import RunDirectory, append_json_line
from launcher.rundir.fence import Fence, current_attempt


def test_a_fence_holds_until_a_later_attempt_puts_up_its_own(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    first, second = Fence(run, 0), Fence(run, 1)
    assert first.holds(), "nobody has begun"
    first.put_up()
    assert first.holds()
    second.put_up()
    assert (first.holds(), second.holds(), current_attempt(run)) == (False, True, 1)
    run.fence.write_text("{")
    assert first.holds(), "a damaged file stops nobody"


def test_a_store_of_a_superseded_attempt_neither_begins_nor_commits(tmp_path: Path) -> None:
    current = [True]
    store = CheckpointStore(tmp_path / "checkpoints", lambda: current[0])
    store.begin(3)
    current[0] = False
    with pytest.raises(OSError, match="a later attempt") as caught:
        store.begin(4)
    assert caught.value.errno == errno.ESTALE
    assert not store.partial(4).exists()


@pytest.mark.parametrize(
    ("checkpoints", "lost"),
    [
        ([], 0),
        ([None], 1),
        ([5], 0),
        ([5, 5], 1),
        ([5, 5, 5], 2),
        ([None, None, 5], 0),
        ([5, 5, 10], 0),
        ([5, 10, 10], 1),
        ([None, None], 2),
    ],
)
def test_attempts_that_published_no_newer_checkpoint_are_counted(
    tmp_path: Path, checkpoints: list[int | None], lost: int
) -> None:
    run = RunDirectory(tmp_path)
    for attempt, step in enumerate(checkpoints):
        append_json_line(run.attempts, {"attempt": attempt, "checkpoint": step})
    assert lost_in_a_row(run) == lost

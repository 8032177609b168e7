"""Which failures are followed by another attempt."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.checkpoint import CheckpointStore, Manifest
from launcher.clusters.progress import Restarts, where
from launcher.errors import EXIT_FAILED, EXIT_REQUEST
from launcher.rundir import RunDirectory
from launcher.rundir.failures import Failure
from tests.unit.configs import good_config


class Launch:
    """A launch's failures, and the checkpoints that are published in between."""

    def __init__(self, folder: Path, allowed: int, published: int | None = None, enabled: bool = True) -> None:
        self._run = RunDirectory(folder)
        if published is not None:
            self.publish(published)
        config = good_config(cluster__max_restarts=allowed, checkpoint__enabled=enabled)
        self.restarts = Restarts(self._run, config)

    def publish(self, step: int) -> None:
        store = CheckpointStore(self._run.checkpoints)
        store.begin(step)
        manifest = Manifest(
            step=step, applied_steps=step, samples=0, world_size=1, strategy="ddp", dtype="float32", config_digest=""
        )
        store.commit(manifest, {})

    def fails(
        self, step: int | None, *, code: int = EXIT_FAILED, stopping: bool = False, reported: bool = False
    ) -> str:
        failure = Failure(rank=0, host="here", log="", message="boom", exit_code=code, step=step)
        refusal = self.restarts.refusal(failure, reported, stopping)
        return "restart" if refusal is None else refusal


def test_restarts_without_progress_are_limited(tmp_path: Path) -> None:
    launch = Launch(tmp_path, allowed=2)
    assert [launch.fails(5), launch.fails(9)] == ["restart", "restart"]
    assert "not restarted: 2 restart(s) have published no checkpoint" in launch.fails(20)


def test_each_new_checkpoint_begins_the_count_anew(tmp_path: Path) -> None:
    launch = Launch(tmp_path, allowed=1, published=10)
    assert launch.fails(12) == "restart"
    for step in (20, 30):
        launch.publish(step)
        assert launch.fails(step + 1) == "restart"
        assert where(launch.restarts.newest_step) == f"from the checkpoint of step {step}"
    assert "none newer than step 30" in launch.fails(39)


@pytest.mark.parametrize(("published", "failed_at"), [(None, None), (None, 0), (10, None), (10, 10)])
def test_a_launchs_failure_before_its_first_step_is_not_retried(
    tmp_path: Path, published: int | None, failed_at: int | None
) -> None:
    launch = Launch(tmp_path, allowed=3, published=published)
    assert launch.fails(failed_at) == "not restarted: it failed before its first step"


def test_a_later_attempts_failure_before_its_first_step_is_retried(tmp_path: Path) -> None:
    launch = Launch(tmp_path, allowed=2, published=10)
    assert launch.fails(11) == "restart"
    assert launch.fails(10) == "restart"
    assert "not restarted" in launch.fails(None)


def test_a_step_that_was_reported_was_one_even_if_a_damaged_checkpoint_is_newer(tmp_path: Path) -> None:
    launch = Launch(tmp_path, allowed=1, published=10)
    assert launch.fails(7, reported=True) == "restart"


@pytest.mark.parametrize("options", [{"code": EXIT_REQUEST}, {"stopping": True}])
def test_a_wrong_request_and_a_request_to_stop_are_not_retried(tmp_path: Path, options: dict[str, int]) -> None:
    assert Launch(tmp_path, allowed=3).fails(5, **options) == ""  # type: ignore[arg-type]


def test_no_restart_is_the_default_and_goes_without_saying(tmp_path: Path) -> None:
    assert Launch(tmp_path, allowed=0, published=3).fails(5) == ""


def test_checkpoints_that_nobody_looks_for_are_no_progress(tmp_path: Path) -> None:
    launch = Launch(tmp_path, allowed=1, enabled=False)
    assert launch.fails(5) == "restart"
    launch.publish(4)
    assert "published no checkpoint" in launch.fails(5)

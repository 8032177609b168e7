"""A rank whose state has parted from the others' is named at once, and the run stops."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks.runs import launch

pytestmark = pytest.mark.ranks


def test_a_rank_that_has_parted_is_named_and_the_run_stops(tmp_path: Path) -> None:
    run = launch(
        tmp_path,
        "+job._target_=padded_job.Padded",
        "+job.inject=desync",
        "+job.inject_rank=2",
        "+job.inject_call=4",
        "precision=fp16",
        "precision.loss_scale.initial=256",
        "train.max_steps=50",
        "train.global_batch_size=12",
        "train.micro_batch_size=4",
        workers=3,
    )
    assert run.code == 1
    assert "of rank(s) [2] is not that of the other ranks" in run.output
    assert "At step 5 the state" in run.output
    assert "Traceback" not in run.output
    assert len(run.lines("train")) <= 6

"""A run that was taken up again is, bit for bit, the run that was never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks.runs import Run, continued, launch, resume

pytestmark = pytest.mark.ranks

BASE = (
    "+job._target_=padded_job.Padded",
    "+job.dropout=0.1",
    "train.max_steps=16",
    "train.global_batch_size=24",
    "train.max_grad_norm=0.5",
    "train.eval_every=12",
    "optimizer.lr=1e-2",
    "schedule=cosine",
    "schedule.warmup_steps=3",
    "checkpoint.every_steps=5",
    "checkpoint.keep=10",
)
# A scale near the end of FP32's range overflows as FP16's does, and is thirty times faster on a CPU.
SCALED = (
    "precision.loss_scale.enabled=true",
    "precision.loss_scale.initial=3e38",
    "precision.loss_scale.maximum=3e38",
    "precision.loss_scale.growth_interval=3",
)
EXACT = ("step", "applied_steps", "samples", "epoch", "loss", "grad_norm", "loss_scale", "overflow", "lr")


def steps(run: Run, after: int = 0) -> list[dict[str, Any]]:
    """What must not differ, of every step after one."""
    return [{key: line[key] for key in EXACT} for line in run.lines("train") if line["step"] > after]


def validations(run: Run, after: int = 0) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in run.lines("validation") if line["step"] > after]


def assert_same(straight: Run, again: Run, after: int) -> None:
    assert again.code == 0, again.output
    assert steps(again) == steps(straight, after)
    assert validations(again) == validations(straight, after)
    assert again.result["parameters_digest"] == straight.result["parameters_digest"]


@pytest.mark.parametrize(
    ("options", "workers"),
    [
        ("parallel=ddp train.micro_batch_size=6", 2),
        ("parallel=zero2 train.micro_batch_size=12 train.num_data_workers=1 train.eval_every=null", 2),
        ("parallel=fsdp train.micro_batch_size=4", 3),
        ("parallel=hsdp parallel.shard_size=2 train.micro_batch_size=6", 4),
        ("optimizer=sgd +optimizer.dampening=0.1 parallel=fsdp train.micro_batch_size=12", 2),
        ("optimizer=adam +optimizer.fused=false +optimizer.amsgrad=true train.micro_batch_size=24", 1),
    ],
)
def test_a_resumed_run_is_the_straight_one_to_the_last_bit(tmp_path: Path, options: str, workers: int) -> None:
    straight = launch(tmp_path, *BASE, *SCALED, *options.split(), workers=workers)
    assert straight.code == 0, straight.output
    scales = {line["loss_scale"] for line in straight.lines("train")}
    assert len(scales) > 2, "the scale moves, before and after the stop"
    again = resume(continued(straight, step=5), workers=workers)
    assert_same(straight, again, after=5)
    (event,) = [line for line in again.lines("event") if line["event"] == "resume"]
    assert (event["step"], event["path"], event["passed_over"]) == (5, "checkpoints/step-00000005", [])

"""Codecs through the command: the loss curve, the figures in metrics.jsonl, overflow."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.ranks.runs import Run, launch

pytestmark = pytest.mark.ranks

LOG_EVERY = 5
BASE = (
    "+job._target_=padded_job.Padded",
    "train.max_steps=20",
    "train.global_batch_size=24",
    "train.max_grad_norm=0.5",
    f"train.log_every={LOG_EVERY}",
    "optimizer.lr=1e-2",
    "schedule=cosine",
    "schedule.warmup_steps=3",
)
SCALED = "precision.loss_scale.enabled=true precision.loss_scale.initial=256"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """ddp on two ranks, FP32 on the wire."""
    run = launch(tmp_path_factory.mktemp("reference"), *BASE, "train.micro_batch_size=12")
    assert run.code == 0, run.output
    return run


@pytest.mark.parametrize(
    ("codec", "strategy", "workers", "micro", "tolerance", "errors"),
    [
        # relative errors: at most half of the last bit; int8: about 1/254 of a block's largest value
        ("fp16", f"ddp {SCALED}", 3, 4, 1e-2, (2.0**-14, 2.0**-11)),
        ("int8", "ddp parallel.bucket_mib=0.01", 2, 6, 2e-2, (1e-3, 3e-2)),
        ("fp16 compression.accumulate=wire", f"zero2 {SCALED}", 2, 12, 1e-2, (2.0**-14, 2.0**-11)),
        ("int8", "fsdp +job.unused=true +job.frozen=true", 4, 3, None, (1e-3, 3e-2)),
        ("bf16 compression.axis=all", "hsdp parallel.shard_size=2", 4, 3, 1e-2, (2.0**-11, 2.0**-8)),
        ("powersgd compression.start_step=4", "hsdp parallel.shard_size=1", 2, 12, 0.2, (1e-2, 1.0)),
    ],
    ids=lambda value: str(value),
)
def test_a_codec_follows_the_loss_curve(
    tmp_path: Path,
    reference: Run,
    codec: str,
    strategy: str,
    workers: int,
    micro: int,
    tolerance: float | None,
    errors: tuple[float, float],
) -> None:
    options = f"compression={codec} parallel={strategy} train.micro_batch_size={micro}".split()
    run = launch(tmp_path, *BASE, *options, workers=workers)
    assert run.code == 0, run.output
    assert len(run.losses) == 20
    if tolerance is None:  # other parameters are trained
        assert run.losses[-1] < run.losses[0]
    else:
        assert run.losses == pytest.approx(reference.losses, rel=tolerance)
    lines = run.lines("train")
    assert all(line["wire_bytes"] > 0 for line in lines)
    measured = {line["step"]: line["compression_error"] for line in lines if "compression_error" in line}
    begun = 4 if "powersgd" in codec else 0
    assert list(measured) == [step for step in range(LOG_EVERY, 21, LOG_EVERY) if step > begun]
    assert all(errors[0] < error < errors[1] for error in measured.values()), measured


def test_fp32_has_bytes_and_no_error(reference: Run) -> None:
    lines = reference.lines("train")
    assert len({line["wire_bytes"] for line in lines}) == 1
    assert lines[0]["wire_bytes"] > 0
    assert not any("compression_error" in line for line in lines)


STEP = 5


@pytest.mark.parametrize(("codec", "strategy"), [("int8", "fsdp"), ("powersgd compression.start_step=2", "ddp")])
def test_one_rank_overflows_and_all_skip_and_go_on(tmp_path: Path, codec: str, strategy: str) -> None:
    """On a step that measures what is lost."""
    run = launch(
        tmp_path,
        *BASE,
        *f"compression={codec} parallel={strategy} {SCALED} train.micro_batch_size=6 train.max_steps=10".split(),
        "+job.inject=before",
        "+job.inject_rank=1",
        f"+job.inject_call={2 * STEP}",
    )
    assert run.code == 0, run.output
    lines = run.lines("train")
    assert [line["step"] for line in lines if line["overflow"]] == [STEP]
    assert [line["loss_scale"] for line in lines] == [256.0] * STEP + [128.0] * (10 - STEP)
    assert lines[-1]["applied_steps"] == 9
    assert all(math.isfinite(line["loss"]) for line in lines)
    measured = {line["step"]: line["compression_error"] for line in lines if "compression_error" in line}
    assert list(measured) == [10], "what was lost by a step that is not finite is not a number"
    assert math.isfinite(measured[10])
    (event,) = [line for line in run.lines("event") if line["event"] == "overflow"]
    assert event["ranks"] == [1]
    assert event["before_wire"] is True

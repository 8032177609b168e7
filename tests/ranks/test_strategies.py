"""One loss curve, whatever the strategy, the number of ranks and the accumulation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks.runs import Run, launch

pytestmark = pytest.mark.ranks

BASE = (
    "+job._target_=padded_job.Padded",
    "train.max_steps=20",
    "train.global_batch_size=24",
    "train.max_grad_norm=0.5",
    "optimizer.lr=1e-2",
    "schedule=cosine",
    "schedule.warmup_steps=3",
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """ddp on one rank, in one micro-batch."""
    run = launch(tmp_path_factory.mktemp("reference"), *BASE, "train.micro_batch_size=24", workers=1)
    assert run.code == 0, run.output
    return run


@pytest.mark.parametrize(
    ("strategy", "workers", "micro"),
    [
        ("ddp", 1, 6),
        ("ddp", 2, 12),
        ("ddp", 4, 3),
        ("ddp", 3, 4),
        ("zero2", 2, 6),
        ("zero2", 4, 6),
        ("fsdp", 1, 24),
        ("fsdp", 2, 4),
        ("fsdp", 4, 3),
        ("hsdp parallel.shard_size=2", 4, 3),
        ("hsdp parallel.shard_size=1", 2, 12),
        ("fsdp parallel.wrap=model parallel.activation_checkpointing=true", 2, 6),
    ],
)
def test_every_layout_follows_one_loss_curve(
    tmp_path: Path, reference: Run, strategy: str, workers: int, micro: int
) -> None:
    overrides = f"parallel={strategy} train.micro_batch_size={micro}".split()
    run = launch(tmp_path, *BASE, *overrides, workers=workers)
    assert run.code == 0, run.output
    assert run.losses == pytest.approx(reference.losses, rel=1e-5)
    assert len(run.losses) == 20
    norms = [line["grad_norm"] for line in run.lines("train")]
    assert norms == pytest.approx([line["grad_norm"] for line in reference.lines("train")], rel=1e-4)
    assert run.result["validation"] == pytest.approx(reference.result["validation"], rel=1e-5)


@pytest.mark.parametrize("strategy", ["zero2", "fsdp", "hsdp"])
def test_sharded_runs_start_from_the_weights_of_ddp(tmp_path: Path, strategy: str) -> None:
    options = (*BASE, "train.micro_batch_size=12", "train.max_steps=1", "optimizer.lr=0")
    whole = launch(tmp_path / "ddp", *options)
    sharded = launch(tmp_path / strategy, *options, f"parallel={strategy}")
    assert whole.code == sharded.code == 0, sharded.output
    assert whole.result["parameters_digest"] == sharded.result["parameters_digest"]


@pytest.mark.parametrize("optimizer", ["sgd", "sgd +optimizer.dampening=0.1", "adam +optimizer.fused=false"])
def test_other_optimizers_follow_one_curve_too(tmp_path: Path, optimizer: str) -> None:
    options = (*BASE[:-3], "train.micro_batch_size=6", "optimizer.lr=1e-2", *f"optimizer={optimizer}".split())
    whole, sharded = (launch(tmp_path, *options, f"parallel={strategy}") for strategy in ("ddp", "fsdp"))
    assert whole.code == sharded.code == 0, sharded.output
    assert sharded.losses == pytest.approx(whole.losses, rel=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_frozen_parameters_stay_as_they_are(tmp_path: Path, strategy: str) -> None:
    run = launch(tmp_path, *BASE, "train.micro_batch_size=12", "+job.frozen=true", f"parallel={strategy}")
    assert run.code == 0, run.output
    assert run.losses[-1] < run.losses[0]


def test_ddp_names_parameters_that_get_no_gradient(tmp_path: Path) -> None:
    options = (*BASE, "train.micro_batch_size=12", "+job.unused=true")
    refused = launch(tmp_path, *options)
    assert refused.code == 2
    assert "unused.weight" in refused.output
    assert "parallel.find_unused_parameters=true" in refused.output
    assert "Traceback" not in refused.output
    allowed = launch(tmp_path, *options, "parallel.find_unused_parameters=true")
    assert allowed.code == 0, allowed.output


def test_fsdp_trains_a_model_with_unused_parameters(tmp_path: Path) -> None:
    run = launch(tmp_path, *BASE, "train.micro_batch_size=12", "+job.unused=true", "parallel=fsdp")
    assert run.code == 0, run.output

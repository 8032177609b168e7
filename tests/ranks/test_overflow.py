"""One rank overflows: all skip, nothing has moved, and the event says where it was."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from tests.ranks.runs import Run, launch

pytestmark = pytest.mark.ranks

BASE = (
    "+job._target_=padded_job.Padded",
    "precision=fp16",
    "precision.loss_scale.initial=256",
    "train.max_steps=6",
    "train.global_batch_size=24",
    "train.micro_batch_size=6",
    "train.log_every=1",
    "optimizer.lr=1e-2",
    "schedule=linear",
)
STEP = 4


def injected(tmp_path: Path, strategy: str, inject: str, call: int) -> Run:
    (tmp_path / "hashes").mkdir()
    run = launch(
        tmp_path / "runs",
        *BASE,
        *f"parallel={strategy}".split(),
        f"+job.inject={inject}",
        "+job.inject_rank=1",
        f"+job.inject_call={call}",
        f"+job.hashes={tmp_path / 'hashes'}",
    )
    assert run.code == 0, run.output
    return run


def parameter_hashes(tmp_path: Path, rank: int) -> list[str]:
    """At the first of the two micro-batches of each step."""
    lines = (tmp_path / "hashes" / f"rank-{rank}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][::2]


@pytest.mark.parametrize(
    ("strategy", "inject", "call"),
    [
        ("ddp", "before", 2 * STEP - 1),
        ("ddp", "before", 2 * STEP),
        ("ddp", "after", 2 * STEP),
        ("zero2", "before", 2 * STEP),
        ("fsdp", "before", 2 * STEP - 1),
        ("fsdp", "after", 2 * STEP),
        ("hsdp parallel.shard_size=1", "after", 2 * STEP),
    ],
)
def test_one_rank_overflows_and_all_skip(tmp_path: Path, strategy: str, inject: str, call: int) -> None:
    run = injected(tmp_path, strategy, inject, call)
    lines = run.lines("train")
    assert [line["step"] for line in lines if line["overflow"]] == [STEP]
    assert [line["loss_scale"] for line in lines] == [256.0] * STEP + [128.0] * (6 - STEP)
    assert [line["applied_steps"] for line in lines] == [1, 2, 3, 3, 4, 5]
    assert lines[STEP]["lr"] == lines[STEP - 1]["lr"] < lines[STEP - 2]["lr"]
    for rank in (0, 1):
        hashes = parameter_hashes(tmp_path, rank)
        assert hashes[STEP - 1] == hashes[STEP], "the skipped step has changed a parameter"
        assert len(set(hashes)) == 5
    if strategy in ("ddp", "hsdp parallel.shard_size=1"):
        assert parameter_hashes(tmp_path, 0) == parameter_hashes(tmp_path, 1)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_event_names_step_rank_host_and_parameters(tmp_path: Path, strategy: str) -> None:
    run = injected(tmp_path, strategy, "before", 2 * STEP)
    (event,) = [line for line in run.lines("event") if line["event"] == "overflow"]
    assert event["step"] == STEP
    assert event["ranks"] == [1]
    assert event["hosts"] == [socket.gethostname()]
    assert event["before_wire"] is True
    assert event["loss_scale"] == 256.0
    assert event["loss_is_finite"] is True
    assert "embedding.weight" in event["parameters"]
    assert len(event["parameters"]) == 10
    assert event["num_parameters"] > 10
    assert f"overflow: skipped; rank 1 on {socket.gethostname()}" in run.output


def test_an_overflow_after_the_wire_is_told_from_one_before(tmp_path: Path) -> None:
    run = injected(tmp_path, "fsdp", "after", 2 * STEP)
    (event,) = [line for line in run.lines("event") if line["event"] == "overflow"]
    assert event["before_wire"] is False
    assert event["ranks"] == []
    assert event["num_parameters"] == 1


def test_a_loss_that_stays_nan_ends_the_run_with_a_diagnosis(tmp_path: Path) -> None:
    options = ("+job.loss=broken", "precision.loss_scale.minimum=64", "precision.loss_scale.patience=5")
    run = launch(tmp_path, *BASE, "train.max_steps=50", *options)
    assert run.code == 1
    assert "The loss itself is not finite" in run.output
    assert "loss scale at its minimum (64)" in run.output
    assert "Traceback" not in run.output
    scales = [line["loss_scale"] for line in run.lines("train")]
    assert scales == [256.0, 128.0] + [64.0] * (len(scales) - 2)
    assert not any(line["applied_steps"] for line in run.lines("train"))


def test_fp32_is_never_trained_on_gradients_that_are_not_finite(tmp_path: Path) -> None:
    run = launch(tmp_path, *BASE, "precision=fp32", "+job.loss=broken", "precision.loss_scale.patience=3")
    assert run.code == 1
    assert "The loss itself is not finite" in run.output

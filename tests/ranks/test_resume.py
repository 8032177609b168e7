"""A run that was taken up again is, bit for bit, the run that was never stopped."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.checkpoint import Checkpoint, FileRecord
from launcher.checkpoint.files import file_digest
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
        ("parallel=ddp train.micro_batch_size=4", 3),
        ("parallel=zero2 train.micro_batch_size=12 train.num_data_workers=1 train.eval_every=null", 2),
        ("parallel=fsdp train.micro_batch_size=4", 3),
        ("parallel=hsdp parallel.shard_size=2 train.micro_batch_size=6", 4),
        ("parallel=ddp compression=int8 train.micro_batch_size=12", 2),
        ("parallel=fsdp compression=int8 train.micro_batch_size=12", 2),
        ("parallel=ddp compression=powersgd compression.start_step=2 train.micro_batch_size=8", 3),
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


def test_a_run_that_began_on_four_ranks_with_fsdp_ends_on_three_with_ddp(tmp_path: Path) -> None:
    straight = launch(tmp_path, *BASE, "job.dropout=0", "parallel=fsdp", "train.micro_batch_size=6", workers=4)
    assert straight.code == 0, straight.output
    changes = ("parallel.strategy=ddp", "train.micro_batch_size=4")
    again = resume(continued(straight, step=10), *changes, workers=3)
    assert again.code == 0, again.output
    assert [line["samples"] for line in again.lines("train")] == [24 * step for step in range(11, 17)]
    assert again.losses == pytest.approx(straight.losses[10:], rel=1e-5)
    assert again.result["validation"] == pytest.approx(straight.result["validation"], rel=1e-5)
    (event,) = [line for line in again.lines("event") if line["event"] == "resume"]
    assert event["notes"] == ["saved on 4 ranks: dropout and the like draw new random numbers on 3"]


def test_a_run_goes_on_in_another_precision_and_says_what_is_added_or_left_out(tmp_path: Path) -> None:
    options = ("job.dropout=0", "train.micro_batch_size=12", "train.eval_every=null", "schedule.decay=constant")
    straight = launch(tmp_path, *BASE, *options)
    scale = "precision.loss_scale.initial=256"
    run = launch(tmp_path, *BASE, *options, "precision=fp16", scale, "train.max_steps=4")
    assert run.code == 0, run.output
    for precision, dtype, steps_in_all, note in (
        ("bf16", "bfloat16", 7, "the loss scale (256) is left out: nothing is scaled now"),
        ("fp16", "float16", 10, "the run was bfloat16 and had no loss scale: it starts at 256"),
        ("fp32", "float32", 13, "the loss scale (256) is left out: nothing is scaled now"),
        ("fp16", "float16", 16, "the run was float32 and had no loss scale: it starts at 256"),
    ):
        scaled = (scale,) if precision == "fp16" else ()
        run = resume(run.directory, f"precision={precision}", *scaled, f"train.max_steps={steps_in_all}")
        assert run.code == 0, run.output
        event = [line for line in run.lines("event") if line["event"] == "resume"][-1]
        assert event["notes"] == [note]
        assert note in run.output
        manifest = run.directory / "checkpoints" / f"step-{steps_in_all:08d}" / "manifest.json"
        assert json.loads(manifest.read_text())["dtype"] == dtype
    assert [line["samples"] for line in run.lines("train")] == [24 * step for step in range(1, 17)]
    assert run.losses == pytest.approx(straight.losses, rel=1e-2)


def test_a_global_batch_of_another_size_goes_on_with_the_next_sample(tmp_path: Path) -> None:
    options = ("train.max_steps=null", "train.max_epochs=4", "train.micro_batch_size=12")
    straight = launch(tmp_path, *BASE, *options)
    again = resume(continued(straight, step=10), "train.global_batch_size=48", "train.micro_batch_size=24")
    assert again.code == 0, again.output
    # 10 steps of 24 and 3 of 48: four epochs of 96.
    assert [(line["step"], line["samples"]) for line in again.lines("train")] == [(11, 288), (12, 336), (13, 384)]
    (event,) = [line for line in again.lines("event") if line["event"] == "resume"]
    assert event["notes"] == ["the global batch was 24 samples and is 48 from here on"]


def test_a_run_stopped_by_a_signal_saves_after_that_step_and_ends_as_the_straight_one(tmp_path: Path) -> None:
    options = (*BASE, "train.micro_batch_size=12", "train.max_steps=300", "checkpoint.every_steps=null")
    straight = launch(tmp_path, *options)
    assert straight.code == 0, straight.output
    project = tmp_path / "stopped"
    project.mkdir()
    shutil.copy(straight.directory.parent / "padded_job.py", project)
    command = [sys.executable, "-m", "launcher", "cluster.processes_per_node=2", "run_dir=run", "device=cpu", *options]
    process = subprocess.Popen(command, cwd=project, stdout=subprocess.DEVNULL)
    metrics, deadline = project / "run" / "metrics.jsonl", time.monotonic() + 60
    while not metrics.exists() or metrics.read_text().count("\n") < 20:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    *_, last = [json.loads(line) for line in metrics.read_text().splitlines() if '"train"' in line]
    assert last["step"] < 300
    names = [path.name for path in (project / "run" / "checkpoints").iterdir()]
    assert names == [f"step-{last['step']:08d}"]
    metrics.unlink()
    assert_same(straight, resume(project / "run"), after=last["step"])


def test_a_run_that_is_complete_is_finished_again_without_a_step(tmp_path: Path) -> None:
    straight = launch(tmp_path, *BASE, "train.micro_batch_size=12")
    directory = continued(straight, step=16)
    again = resume(directory)
    assert again.code == 0, again.output
    assert again.lines("train") == []
    for key in ("step", "loss", "validation", "parameters_digest"):
        assert again.result[key] == straight.result[key]


def flip_a_bit(checkpoint: Path) -> None:
    path = checkpoint / "__1_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_it_taken(tmp_path: Path) -> None:
    straight = launch(tmp_path, *BASE, "train.micro_batch_size=12")
    directory = continued(straight, step=10)
    flip_a_bit(directory / "checkpoints" / "step-00000010")
    again = resume(directory)
    assert_same(straight, again, after=5)
    (event,) = [line for line in again.lines("event") if line["event"] == "resume"]
    assert event["passed_over"] == ["step-00000010: __1_0.distcp is damaged: its content is not what was written"]
    assert "step-00000010: __1_0.distcp is damaged" in again.output
    aside = [path.name for path in (directory / "checkpoints").iterdir() if "set-aside" in path.name]
    assert len(aside) == 1
    assert aside[0].startswith("step-00000010.set-aside-")


def craft(checkpoint: Path, rank: int, change: Callable[[dict[str, Any]], object]) -> None:
    """A rank's own file as a hostile or mistaken writer could have made it, with its digest."""
    path = checkpoint / f"rank-{rank}.pt"
    own = torch.load(path, weights_only=True)
    change(own)
    torch.save(own, path)
    manifest = Checkpoint(checkpoint, int(checkpoint.name.removeprefix("step-"))).manifest
    manifest.files[path.name] = FileRecord(path.stat().st_size, file_digest(path))
    (checkpoint / "manifest.json").write_bytes(manifest.render())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_checkpoint_with_wrong_content_on_one_rank_is_passed_over_by_all(tmp_path: Path, strategy: str) -> None:
    options = (f"parallel={strategy}", "compression=int8", "train.micro_batch_size=12", *SCALED)
    straight = launch(tmp_path, *BASE, *options)
    directory = continued(straight, step=15)
    craft(directory / "checkpoints" / "step-00000015", 1, lambda own: own["random"].update(torch=torch.ones(3)))
    craft(directory / "checkpoints" / "step-00000010", 0, lambda own: own["wire"].update(x="y"))
    again = resume(directory)
    assert_same(straight, again, after=5)
    (event,) = [line for line in again.lines("event") if line["event"] == "resume"]
    newest, before = event["passed_over"]
    assert newest.startswith("step-00000015: rank-1.pt does not hold what belongs there (")
    assert before.startswith("step-00000010: rank-0.pt does not hold what belongs there (")
    assert len(list((directory / "checkpoints").glob("*.set-aside-*"))) == 2
    assert "Traceback" not in again.output


def test_what_does_not_fit_one_rank_is_refused_by_all_and_nothing_is_set_aside(tmp_path: Path) -> None:
    straight = launch(tmp_path, *BASE, "train.micro_batch_size=12")
    directory = continued(straight, step=15)
    craft(directory / "checkpoints" / "step-00000015", 1, lambda own: own["optimizer_groups"][0].update(eps="small"))
    there = sorted(path.name for path in (directory / "checkpoints").iterdir())
    again = resume(directory)
    assert again.code == 2, again.output
    assert "step-00000015 does not fit what this run builds now: " in again.output
    assert "['eps'] is a str instead of a number. Undo the change to the model or the optimizer" in again.output
    assert "Traceback" not in again.output
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == there


def test_other_ranks_look_at_every_ranks_file_before_they_take_anything_up(tmp_path: Path) -> None:
    straight = launch(tmp_path, *BASE, "compression=int8", "train.micro_batch_size=8", workers=3)
    directory = continued(straight, step=10)
    craft(directory / "checkpoints" / "step-00000010", 2, lambda own: own.update(wire=[1]))
    again = resume(directory, "train.micro_batch_size=12", workers=2)
    assert again.code == 0, again.output
    (event,) = [line for line in again.lines("event") if line["event"] == "resume"]
    assert event["passed_over"] == ["step-00000010: rank-2.pt does not hold what a rank saves (wire)"]
    assert event["step"] == 5


def test_a_run_whose_checkpoints_are_all_damaged_does_not_silently_begin_again(tmp_path: Path) -> None:
    straight = launch(tmp_path, *BASE, "train.micro_batch_size=12")
    directory = continued(straight, step=5)
    flip_a_bit(directory / "checkpoints" / "step-00000005")
    again = resume(directory)
    assert again.code == 2
    assert "There is no valid checkpoint to go on from" in again.output
    assert "step-00000005: __1_0.distcp is damaged" in again.output
    assert "Traceback" not in again.output


def test_a_checkpoint_of_another_model_is_refused_with_what_differs(tmp_path: Path) -> None:
    straight = launch(tmp_path, *BASE, "train.micro_batch_size=12")
    again = resume(continued(straight, step=5), "+job.width=20")
    assert again.code == 2
    assert "is not of this model" in again.output
    assert "embedding.weight is (17, 16) there and (17, 20) here" in again.output
    assert "Traceback" not in again.output


def test_the_best_of_no_validation_is_refused_before_the_first_step(tmp_path: Path) -> None:
    run = launch(tmp_path, *STREAM, "checkpoint.keep_best=2", job="stream_job", workers=1)
    assert run.code == 2
    assert "checkpoint.keep_best=2, but Streaming.build_dataset('validation') returned None" in run.output
    assert "Traceback" not in run.output
    assert not (run.directory / "metrics.jsonl").exists()


STREAM = ("+job._target_=stream_job.Streaming", *BASE[2:], "train.micro_batch_size=6", "train.eval_every=null")


def test_a_stream_with_a_state_is_taken_up_where_each_rank_was(tmp_path: Path) -> None:
    straight = launch(tmp_path, *STREAM, job="stream_job")
    assert straight.code == 0, straight.output
    assert_same(straight, resume(continued(straight, step=5)), after=5)
    elsewhere = resume(continued(straight, step=5), "train.micro_batch_size=4", workers=3)
    assert elsewhere.code == 2
    assert "was saved on 2 ranks and these are 3: the training data is an IterableDataset" in elsewhere.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("train.num_data_workers=1", "use train.num_data_workers=0"),
        ("train.max_steps=null train.max_epochs=1", "has no length: use train.max_steps"),
    ],
)
def test_a_stream_that_could_not_be_taken_up_is_refused(tmp_path: Path, options: str, words: str) -> None:
    run = launch(tmp_path, *STREAM, *options.split(), job="stream_job", workers=1)
    assert run.code == 2
    assert words in run.output
    assert "Traceback" not in run.output

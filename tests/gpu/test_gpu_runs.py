"""The shipped experiments on CUDA, one worker per GPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks.runs import Run, continued, resume

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is false: no GPU here"),
]

STEPS = 50


def train(folder: Path, *overrides: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """50 steps on CUDA: the lines of the steps, and the result."""
    command = [sys.executable, "-m", "launcher", "device=cuda", "run_dir=run", f"train.max_steps={STEPS}", *overrides]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "train"], json.loads((folder / "run" / "result.json").read_text())


def test_digits_learns_in_fp16_on_cuda(tmp_path: Path) -> None:
    lines, result = train(tmp_path, "+experiment=digits", "train.micro_batch_size=16")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert result["validation"]["accuracy"] > 0.8
    assert lines[-1]["memory_gib"] > 0


def test_gpt2_of_124_million_parameters_learns_in_fp16_on_cuda(tmp_path: Path) -> None:
    lines, _ = train(
        tmp_path,
        "+experiment=gpt2_124m",
        f"train.global_batch_size={32 * torch.cuda.device_count()}",
        "train.micro_batch_size=8",
        "train.eval_every=null",
        "schedule.warmup_steps=10",
        "job.max_bytes=4000000",
    )
    losses = [line["loss"] for line in lines]
    assert all(map(math.isfinite, losses))
    assert losses[0] == pytest.approx(math.log(50304), rel=0.1)
    assert losses[-1] < 4.0
    assert lines[-1]["applied_steps"] == STEPS - sum(line["overflow"] for line in lines)


def test_a_resumed_run_on_cuda_goes_on_as_the_straight_one(tmp_path: Path) -> None:
    settings = ("+experiment=digits", "train.micro_batch_size=16", "checkpoint.every_steps=20", "checkpoint.keep=9")
    straight = tmp_path / "straight"
    straight.mkdir()
    lines, _ = train(straight, *settings)
    again = resume(continued(Run(0, "", straight / "run"), step=20), workers=torch.cuda.device_count())
    assert again.code == 0, again.output
    resumed = again.lines("train")
    assert [line["step"] for line in resumed] == list(range(21, STEPS + 1))
    for key in ("loss_scale", "applied_steps", "lr"):
        assert [line[key] for line in resumed] == [line[key] for line in lines[20:]]
    assert again.losses == pytest.approx([line["loss"] for line in lines[20:]], rel=1e-3)

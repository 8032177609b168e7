"""Wrong requests: one message, exit code 2, no traceback, nothing left on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.session import Command

Start = Callable[..., Command]

MISTAKES = {
    "a misspelled key": (["train.max_step=3"], "Did you mean 'max_steps'?"),
    "a misspelled group": (["presicion=fp16"], "Did you mean 'precision'?"),
    "an unknown option": (["precision=fp61"], "Did you mean 'fp16'? Valid: bf16, fp16, fp32."),
    "a wrong type": (["train.max_steps=many"], "train.max_steps=many is not a whole number"),
    "an unknown word": (["device=tpu"], "expected one of [auto, cpu, cuda]"),
    "a negative size": (["train.micro_batch_size=-2"], "train.micro_batch_size=-2 is too small"),
    "both lengths": (["train.max_epochs=1"], "both are given. Give exactly one"),
    "neither length": (["train.max_steps=null"], "neither is given. Give exactly one"),
    "a batch that does not divide": (["train.global_batch_size=7"], "Use 4 or 8"),
    "more processes than GPUs": (["device=cuda"], "torch sees no CUDA GPU here"),
    "a module that is not there": (["job._target_=nowhere.Job"], "No module named 'nowhere'"),
    "a class that is not there": (["job._target_=own_job.Other"], "own_job.Other"),
    "an argument that is not there": (["+job.slep=1"], "Did you mean 'sleep'?"),
    "an optimizer's argument": (["+optimizer.beta=1"], "Did you mean 'betas'?"),
    "a folder below a file": (["runs_root=own_job.py/x"], "no run directory can be made there"),
    "a verb that is not there": (["frobnicate"], "'frobnicate' is not an override"),
    "a shard size that does not divide": (["parallel=hsdp", "parallel.shard_size=3"], "Valid: 1, 2."),
    "a shard size for ddp": (["parallel.shard_size=2"], "parallel.shard_size=2 is for parallel=hsdp alone"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_message(start: Start, project: Path, mistake: str) -> None:
    overrides, message = MISTAKES[mistake]
    command = start(["+experiment=own", *overrides], project)
    assert command.wait() == 2
    assert message in command.errors
    assert command.errors.startswith("launch: ")
    assert "Traceback" not in command.errors
    assert command.output == ""
    assert not (project / "runs").exists()


def test_a_module_that_does_not_parse_is_named_with_its_line(start: Start, project: Path) -> None:
    (project / "own_job.py").write_text("class Own(:\n")
    command = start(["+experiment=own"], project)
    assert command.wait() == 2
    assert "own_job.py, line 1" in command.errors
    assert "Traceback" not in command.errors


def test_yaml_that_does_not_parse_is_named(start: Start, project: Path) -> None:
    (project / "conf" / "experiment" / "own.yaml").write_text("train: {max_steps: 3\nname: [")
    command = start(["+experiment=own"], project)
    assert command.wait() == 2
    assert "own.yaml" in command.errors
    assert "Traceback" not in command.errors


def test_a_job_without_a_method_is_told_which(start: Start, project: Path) -> None:
    source = (project / "own_job.py").read_text()
    (project / "own_job.py").write_text(source.replace("def compute_loss", "def compute_los"))
    command = start(["+experiment=own"], project)
    assert command.wait() == 2
    assert "lacks the method(s) compute_loss(" in command.errors


def test_fp16_without_a_loss_scale_is_warned_about(start: Start, project: Path) -> None:
    options = ["precision=fp16", "precision.loss_scale.enabled=false", "train.max_steps=1"]
    command = start(["+experiment=own", *options], project)
    assert command.wait() == 0
    assert "gradients below 6e-8 become zero" in command.errors


def test_a_run_directory_that_holds_something_is_not_touched(start: Start, project: Path) -> None:
    command = start(["+experiment=own", "run_dir=conf"], project)
    assert command.wait() == 2
    assert "is not empty" in command.errors
    assert sorted(path.name for path in (project / "conf").iterdir()) == ["experiment"]

"""Weights out of a run, into plain PyTorch and into another run."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import make_project
from tests.e2e.session import Command
from tests.ranks.test_resume import craft, flip_a_bit

Start = Callable[..., Command]
MODEL = '''
import torch
from torch import nn


class Count(nn.Module):
    """Extra state that is a tensor."""

    def __init__(self):
        super().__init__()
        self.calls = torch.zeros(1, dtype=torch.float64)

    def forward(self, x):
        self.calls = self.calls + self.training
        return x

    def get_extra_state(self):
        return self.calls

    def set_extra_state(self, state):
        self.calls = state


class Model(nn.Module):
    """Tied weights, buffers of two types, extra state; knows nothing of T-minus."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.count = Count()

    def forward(self, tokens):
        return self.count(self.head(self.norm(self.embedding(tokens))))
'''
JOB = """
import torch
from torch.nn.functional import cross_entropy
from launcher import Job, LossOutput
from tied_model import Model


class Tied(Job):
    def build_model(self):
        return Model()

    def build_dataset(self, split):
        tokens = torch.arange(64) % 7
        return torch.utils.data.TensorDataset(tokens, (tokens + 1) % 7)

    def compute_loss(self, model, batch):
        tokens, following = batch
        return LossOutput(cross_entropy(model(tokens).float(), following, reduction="sum"), len(tokens))
"""
PLAIN = """
import hashlib, json, sys
from safetensors import safe_open
from safetensors.torch import load_file
from tied_model import Model
model = Model()
weights = load_file(sys.argv[1])
loaded = str(model.load_state_dict(weights))
assert not any(name.startswith("launcher") for name in sys.modules)
print(json.dumps({
    "loaded": loaded,
    "tied": model.head.weight is model.embedding.weight,
    "types": {name: str(value.dtype) for name, value in weights.items()},
    "calls": float(model.count.calls),
    "batches": int(model.norm.num_batches_tracked),
    "metadata": safe_open(sys.argv[1], "pt").metadata(),
    "digest": hashlib.sha256(
        b"".join(value.detach().numpy().tobytes() for _, value in sorted(model.named_parameters()))
    ).hexdigest(),
}))
"""
STEPS = ["train.global_batch_size=8", "train.micro_batch_size=2", "checkpoint.every_steps=4", "optimizer.lr=0.01"]
TRAIN = ["+job._target_=tied_job.Tied", *STEPS]


def make_tied_project(folder: Path) -> Path:
    project = make_project(folder)
    (project / "tied_model.py").write_text(MODEL)
    (project / "tied_job.py").write_text(JOB)
    return project


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a run of nine steps in ``mine``."""
    project = make_tied_project(tmp_path_factory.mktemp("trained") / "project")
    command = Command([*TRAIN, "run_dir=mine", "train.max_steps=9"], project)
    assert command.wait() == 0, command.errors
    return project


def in_plain_pytorch(project: Path, file: Path) -> dict[str, Any]:
    """What a program that has never heard of T-minus makes of a file."""
    command = [sys.executable, "-c", PLAIN, str(file)]
    completed = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True, timeout=60)
    content: dict[str, Any] = json.loads(completed.stdout)
    return content


def digest(run: Path) -> str:
    return str(json.loads((run / "result.json").read_text())["parameters_digest"])


def test_plain_pytorch_loads_it_strictly_tied_weights_and_buffers_too(
    start: Start, trained: Path, tmp_path: Path
) -> None:
    command = start(["export", "mine", str(tmp_path / "out.safetensors")], trained)
    assert command.wait() == 0, command.errors
    assert "8 tensors of step 9 as float32" in command.output
    plain = in_plain_pytorch(trained, tmp_path / "out.safetensors")
    assert plain["loaded"] == "<All keys matched successfully>"
    assert plain["tied"]
    assert plain["digest"] == digest(trained / "mine")
    assert plain["types"]["norm.num_batches_tracked"] == "torch.int64"
    assert plain["batches"] == plain["calls"] > 9
    assert json.loads(plain["metadata"]["tminus_tied"]) == {"head.weight": "embedding.weight"}
    assert plain["metadata"]["tminus_step"] == "9"


def test_an_older_checkpoint_and_another_type_can_be_asked_for(start: Start, trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "half.safetensors"
    command = start(["export", "mine", str(file), "--dtype", "bfloat16", "--step", "8"], trained)
    assert command.wait() == 0, command.errors
    plain = in_plain_pytorch(trained, file)
    assert plain["loaded"] == "<All keys matched successfully>"
    assert plain["types"]["embedding.weight"] == "torch.bfloat16"
    assert plain["types"]["count._extra_state"] == "torch.float64"
    assert plain["types"]["norm.num_batches_tracked"] == "torch.int64"
    assert plain["metadata"]["tminus_step"] == "8"
    assert plain["digest"] != digest(trained / "mine")


def test_wrong_requests_get_one_message_and_write_nothing(start: Start, trained: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.safetensors"
    there.write_text("mine")
    pipe, dangling = tmp_path / "pipe", tmp_path / "dangling"
    os.mkfifo(pipe)
    dangling.symlink_to("nowhere")
    for arguments, message in (
        (["export", "mine", str(there)], "is there already: name another file, or replace it with --force"),
        (["export", "mine", str(tmp_path)], "is a folder"),
        (["export", "mine", str(pipe), "--force"], "is neither a file nor a folder, and is not replaced"),
        (["export", "mine", str(dangling)], "is there already"),
        (["export", "mine", str(tmp_path / "no" / "out")], "is no folder that you can write to"),
        (["export", "other", str(tmp_path / "out")], "There is no run 'other'"),
        (["export", "mine", str(tmp_path / "out"), "--step", "3"], "There are those of step 8, 9."),
        (["export", "mine", str(tmp_path / "out"), "--dtype", "int8"], "invalid choice: 'int8'"),
        (["export", "mine"], "the following arguments are required: FILE"),
    ):
        command = start(arguments, trained)
        assert command.wait() == 2, arguments
        assert message in command.errors
        assert "Traceback" not in command.errors
    assert there.read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == [dangling, pipe, there]
    assert pipe.is_fifo()
    assert dangling.is_symlink()
    command = start(["export", "mine", str(there), "--force"], trained)
    assert command.wait() == 0, command.errors
    assert there.stat().st_size > 100


def test_a_full_disk_leaves_what_was_there(start: Start, trained: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.safetensors"
    there.write_text("mine")
    limited = ("sh", "-c", f'ulimit -f 1; exec {shlex.quote(sys.executable)} -B -m launcher "$@"', "launch")
    command = start(["export", "mine", str(there), "--force"], trained, limited)
    assert command.wait() == 2
    assert f"{there} could not be written" in command.errors
    assert "Traceback" not in command.errors
    assert there.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [there]


def test_damaged_checkpoints_are_passed_over_and_with_no_other_named(
    start: Start, trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "mine", run)
    newest, before = run / "checkpoints" / "step-00000009", run / "checkpoints" / "step-00000008"
    craft(newest, 0, lambda own: own.update(extra=3))
    command = start(["export", str(run), str(tmp_path / "out")], tmp_path)
    assert command.wait() == 0, command.errors
    assert "step-00000009: rank-0.pt does not hold what a rank saves (extra)" in command.output
    assert "tensors of step 8 as float32" in command.output
    flip_a_bit(before)
    command = start(["export", str(run), str(tmp_path / "other")], tmp_path)
    assert command.wait() == 2
    assert "has no checkpoint that can be used" in command.errors
    assert "step-00000009: rank-0.pt does not hold" in command.errors
    assert "step-00000008: __1_0.distcp is damaged" in command.errors
    assert "Traceback" not in command.errors
    assert not (tmp_path / "other").exists()


def test_a_run_that_goes_on_and_removes_its_checkpoints_is_exported(start: Start, project: Path) -> None:
    options = ["checkpoint.every_steps=1", "checkpoint.keep=1", "train.max_steps=100000"]
    training = start(["+experiment=own", "run_dir=mine", *options], project)
    training.until(lambda: len(list((project / "mine" / "checkpoints").glob("step-*[0-9]"))) > 0)
    for number in range(3):
        command = start(["export", "mine", f"{number}.safetensors"], project)
        assert command.wait() == 0, command.errors
        assert "warning" not in command.output
    training.send(signal.SIGTERM)
    assert training.wait() == 75


@pytest.mark.parametrize(("strategy", "workers"), [("ddp", 1), ("fsdp", 2)])
def test_a_run_begins_with_the_weights_of_a_file(
    start: Start, trained: Path, tmp_path: Path, strategy: str, workers: int
) -> None:
    """At a learning rate of zero the weights stay those of the file."""
    project = make_tied_project(tmp_path / "project")
    exported = start(["export", "mine", str(project / "begin.safetensors")], trained)
    assert exported.wait() == 0, exported.errors
    options = ["optimizer.lr=0.0", "train.max_steps=2", "run_dir=other", f"parallel={strategy}", "seed=5"]
    command = start(
        [*TRAIN, *options, f"cluster.processes_per_node={workers}", "train.init_from=begin.safetensors"], project
    )
    assert command.wait() == 0, command.errors
    assert digest(project / "other") == digest(trained / "mine")
    # A run that has a checkpoint goes on from it, and does not need the file any more.
    (project / "begin.safetensors").unlink()
    command = start(["resume", "other", "train.max_steps=3"], project)
    assert command.wait() == 0, command.errors
    assert digest(project / "other") == digest(trained / "mine")


def test_weights_of_another_model_are_one_message(start: Start, trained: Path, tmp_path: Path) -> None:
    exported = start(["export", "mine", str(tmp_path / "tied.safetensors")], trained)
    assert exported.wait() == 0, exported.errors
    command = start(["+experiment=own", f"train.init_from={tmp_path / 'tied.safetensors'}"], trained)
    assert command.wait() == 2
    assert "missing in the file: weight, bias" in command.errors
    assert "not in the model: count._extra_state, embedding.weight" in command.errors
    assert command.errors.count("does not fit the model") == 1
    assert "Traceback" not in command.errors
    command = start(["+experiment=own", "train.init_from=nothing"], trained)
    assert command.wait() == 2
    assert "there is no such file" in command.errors
    (tmp_path / "text").write_text("no weights")
    command = start(["+experiment=own", f"train.init_from={tmp_path / 'text'}"], trained)
    assert command.wait() == 2
    assert "cannot be read as a .safetensors file" in command.errors

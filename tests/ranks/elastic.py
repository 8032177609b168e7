"""Functions of one rank that save a learner and load it elsewhere, for pools of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from launcher import LossOutput
from launcher.checkpoint import CheckpointStore
from launcher.checkpoint.saver import Saved, Saver
from launcher.compression.feedback import Feedback
from launcher.compression.layout import Slice
from launcher.compression.wire import Residue
from launcher.config.schema import Verify
from launcher.environment import Ranks
from launcher.learner import build_learner
from launcher.training.batches import BatchShape, TrainingData
from launcher.training.digest import parameters_digest
from launcher.training.progress import Identity, Progress, continued, take_snapshot
from launcher.training.restoring import read
from launcher.training.step import Learner, train_step
from tests.ranks.padded_job import Padded, Sequences
from tests.unit.configs import good_config

__all__ = ["load", "save"]

CPU = torch.device("cpu")
GLOBAL_BATCH = 12
SHARD_SIZES = {1: 1, 2: 1, 3: 3, 4: 2}


class Memory(nn.Module):
    """State that is neither parameter nor buffer."""

    words = "new"

    def get_extra_state(self) -> dict[str, str]:
        return {"words": self.words}

    def set_extra_state(self, state: dict[str, str]) -> None:
        self.words = state["words"]


class Elastic(Padded):
    """Same loss; its own state counts calls."""

    def build_model(self) -> nn.Module:
        model = super().build_model()
        model.memory = Memory()
        return model

    def compute_loss(self, model: Any, batch: Any) -> LossOutput:
        tokens, targets = batch
        logits = model(tokens).float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)
        return LossOutput(loss, (targets != -100).sum())

    def state_dict(self) -> dict[str, Any]:
        return {"words": ["any", 1]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state


def keep_errors(learner: Learner, rank: int, world_size: int) -> None:
    """Errors as a codec keeps them: what each rank holds adds up to a whole."""
    errors = Feedback(5, CPU)
    errors.kept.fill_(float(rank + 1))
    whole = (Slice(0, "body.0.weight", 0, 5),)
    learner.model.wire.residues.append(Residue("test.scattered", errors, whole, weight=1.0, share=1.0 / world_size))


def build(rank: int, world_size: int, settings: dict[str, Any]) -> tuple[Learner, TrainingData, Identity]:
    strategy = settings["parallel__strategy"]
    config = good_config(**settings, cluster__processes_per_node=world_size, train__max_grad_norm=0.5)
    if strategy == "hsdp":
        config.parallel.shard_size = SHARD_SIZES[world_size]
    job = Elastic(width=16)
    shape = BatchShape(GLOBAL_BATCH // world_size, 1, world_size)
    ranks = Ranks(rank, world_size, rank, world_size, 0, "here")
    learner = build_learner(config, job, CPU, ranks, shape, steps=100)
    keep_errors(learner, rank, world_size)
    data = TrainingData(job, Sequences(96), shape, rank, seed=0)
    return learner, data, Identity(strategy, config.precision.dtype.value, "x", 0, rank, world_size)


def advance(learner: Learner, data: TrainingData, steps: int, offset: int = 0) -> list[float]:
    batches = data.micro_batches(range(learner.steps, learner.steps + steps), 0, False, offset)
    return [train_step(learner, [batch], stop=False).read().loss for batch in batches]


def save(rank: int, world_size: int, folder: str, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Train, save, train on: what the state was, and how the loss went on."""
    learner, data, identity = build(rank, world_size, settings)
    losses = advance(learner, data, steps)
    learner.model.module.memory.words = "kept"
    saver = Saver(CheckpointStore(Path(folder)), rank, world_size, CPU)
    before = state_digests(learner)
    saver.begin(lambda: take_snapshot(learner, data, identity, Progress(), None))
    saved = saver.settle()
    assert isinstance(saved, Saved), saved
    assert state_digests(learner) == before, "saving changes nothing"
    return {"state": before, "before": losses, "after": advance(learner, data, 3)}


def load(rank: int, world_size: int, folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Load, train on: what the state is, and how the loss goes on."""
    learner, data, identity = build(rank, world_size, settings)
    found = CheckpointStore(Path(folder)).newest_valid(Verify.full)
    assert found.checkpoint is not None
    progress, notes = continued(learner, data, identity, read(learner, found.checkpoint, rank, world_size))
    state = state_digests(learner)
    residue = learner.model.wire.residues[-1].feedback.kept.tolist()
    return {
        "state": state,
        "notes": notes,
        "after": advance(learner, data, 3, progress.offset),
        "residue": residue,
        "job": learner.job.loaded,
        "extra": learner.model.module.memory.words,
    }


def state_digests(learner: Learner) -> dict[str, Any]:
    """Everything that must be the same wherever it is loaded."""
    from torch.distributed.tensor import DTensor

    from launcher.training.state import shared_tensors

    tensors = {name: t for name, t in shared_tensors(learner, rank=1).items() if name.startswith("optimizer.")}
    holder = nn.Module()
    scalars = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 0:
            scalars[name] = float(tensor)
        else:
            value = tensor if isinstance(tensor, DTensor) else tensor.clone()
            holder.register_parameter(name.replace(".", "/"), nn.Parameter(value.detach(), requires_grad=False))
    return {
        "parameters": parameters_digest(learner.model.module),
        "moments": parameters_digest(holder),
        "entries": sorted(tensors),
        "scalars": scalars,
        "loss_scale": learner.loss_scale.state_dict(),
        "applied": float(learner.schedule.applied_steps),
        "steps": learner.steps,
        "expected": learner.expected_items,
    }

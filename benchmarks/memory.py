"""Bytes per parameter on each rank: weights, gradients and optimizer state, as the sum of live storages."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from launcher.jobs.language_model import LanguageModelJob
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from benchmarks.common import print_table, run_ranks
from benchmarks.contestants import Setup, random_batches
from launcher.job import LossOutput
from launcher.training.step import Learner, train_step

_CASES = {1: ("ddp", "zero2", "fsdp"), 2: ("ddp", "zero2", "fsdp"), 4: ("ddp", "zero2", "fsdp", "hsdp")}
_SHARD_SIZE = 2  # of hsdp


@dataclass
class Bytes:
    """Per parameter of the model."""

    forward: float = 0.0
    """All tensors between the last forward and its backward, beside what autograd keeps to itself."""
    micro: float = 0.0
    """The same before the last forward: what accumulation keeps."""
    step: float = 0.0
    """All tensors before the optimizer steps."""
    parts: dict[str, float] = field(default_factory=dict)
    """Of these: weights, gradients, optimizer state."""


def _live(tensors: list[Any] | None = None) -> int:
    """Bytes of the storages behind some tensors, or behind every tensor that Python knows; each once."""
    found = [value for value in gc.get_objects() if issubclass(type(value), Tensor)] if tensors is None else tensors
    # A gradient that Python has not asked for yet is unknown to it.
    found += [tensor.grad for tensor in found if tensor.is_leaf and tensor.grad is not None]
    sizes: dict[int, int] = {}
    for tensor in found:
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        if local.device.type == "cpu" and type(local) in (Tensor, nn.Parameter):
            storage = local.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


class _Watched(LanguageModelJob):
    """Looks at the memory around the last forward."""

    seen: Bytes
    before = 0

    def compute_loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> LossOutput:
        self.seen.micro = _live() - self.before
        output = super().compute_loss(model, batch)
        self.seen.forward = _live() - self.before
        return output


def measure(rank: int, world_size: int, strategy: str) -> Bytes:
    """One rank's, in the third step of two micro-batches."""
    job = _Watched(context=8, num_layers=3, num_heads=4, width=512)
    job.seen = Bytes()
    shard_size = _SHARD_SIZE if strategy == "hsdp" else None
    setup = Setup(job, strategy=strategy, dtype="bfloat16", micro_batch_size=1, shard_size=shard_size)
    batches = random_batches(job, setup.accumulation_steps, setup.micro_batch_size)
    job.before = _live()
    learner = setup.learner(rank, world_size)
    for _ in range(2):
        train_step(learner, batches, stop=False)
    _watch_step(learner, job)
    train_step(learner, batches, stop=False)
    elements = sum(parameter.numel() for parameter in learner.model.module.parameters())
    seen = job.seen
    return Bytes(
        forward=seen.forward / elements,
        micro=seen.micro / elements,
        step=seen.step / elements,
        parts={name: size / elements for name, size in seen.parts.items()},
    )


def measure_all(rank: int, world_size: int, strategies: Sequence[str]) -> dict[str, Bytes]:
    """One rank's, of several strategies, one after the other."""
    found = {}
    for strategy in strategies:
        gc.collect()
        found[strategy] = measure(rank, world_size, strategy)
    return found


def _watch_step(learner: Learner, job: _Watched) -> None:
    """Look once the gradients are there, and before the optimizer steps."""
    bind = learner.optimizer.gradients

    def gradients() -> Any:
        found = bind()
        weights = [weight.detach() for weight in learner.model.module.parameters()]
        state = [v for entry in learner.optimizer.optimizer.state.values() for v in entry.values() if v.numel() > 1]
        job.seen.step = _live() - job.before
        job.seen.parts = {"weights": _live(weights), "gradients": _live([*found.values]), "state": _live(state)}
        return found

    learner.optimizer.gradients = gradients  # type: ignore[method-assign]


def _promised(strategy: str, world_size: int) -> float:
    """DESIGN's formula."""
    if strategy == "ddp":
        return 16.0
    if strategy == "zero2":
        return 2 + 16 / world_size
    return 16 / (_SHARD_SIZE if strategy == "hsdp" else world_size)


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    rows: list[list[object]] = []
    found = {size: run_ranks(size, measure_all, strategies) for size, strategies in _CASES.items()}
    for strategy, world_size in sorted((name, size) for size, names in _CASES.items() for name in names):
        most = max((ranks[strategy] for ranks in found[world_size]), key=lambda one: one.step)
        parts = " + ".join(f"{size:.2f}" for size in most.parts.values())
        promised = _promised(strategy, world_size)
        rows.append([f"{strategy}, {world_size} rank(s)", promised, parts, most.step, most.forward, most.micro])
    header = ["", "formula", "weights + gradients + state", "all, at the step", "all, after forward", "before it"]
    print_table("Bytes per parameter on the fullest rank, BF16, accumulation 2", header, rows)


if __name__ == "__main__":
    main()

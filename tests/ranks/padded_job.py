"""A small language model on padded sequences, with switches to break it; copied into a project's folder by tests."""

import hashlib
import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from launcher import Job, LossOutput
from launcher.precision import control, loss_scale

RANK = int(os.environ.get("RANK", "0"))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, width: int, frozen: bool, unused: bool, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, width)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.odd = nn.Parameter(torch.randn(3) * 0.1)  # fewer rows than some have ranks
        if frozen:
            self.blocks[0].norm.requires_grad_(False)
        if unused:
            self.unused = nn.Linear(3, 3)

    def forward(self, tokens):
        if self.training:
            self.seen += len(tokens)
        x = self.dropout(self.embedding(tokens) + self.odd.sum())
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)


class Sequences(torch.utils.data.Dataset):
    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.tokens = torch.randint(0, 17, (size, 9), generator=generator)
        self.lengths = torch.randint(1, 9, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index):
        targets = self.tokens[index, 1:].clone()
        targets[self.lengths[index] :] = -100
        return self.tokens[index, :-1], targets


class Padded(Job):
    def __init__(
        self,
        width: int = 16,
        frozen: bool = False,
        unused: bool = False,
        inject_rank: int = -1,
        inject_call: int = 0,
        inject: str = "nothing",
        hashes: str | None = None,
        loss: str = "finite",
        dropout: float = 0.0,
    ) -> None:
        self.width, self.frozen, self.unused, self.loss, self.dropout = width, frozen, unused, loss, dropout
        self.inject_rank, self.inject_call, self.inject, self.hashes = inject_rank, inject_call, inject, hashes
        self.calls = 0
        if inject == "after":
            _spoil_after_the_wire(self)
        if inject == "desync":
            _part_from_the_others(self)

    def build_model(self):
        return Model(self.width, self.frozen, self.unused, self.dropout)

    def build_dataset(self, split):
        torch.rand(3)  # a user's code may draw wherever it is called
        return Sequences(96 if split == "train" else 13)

    def compute_loss(self, model, batch):
        tokens, targets = batch
        if torch.is_grad_enabled():
            self.calls += 1
            if self.hashes:
                _write_hash(model, Path(self.hashes) / f"rank-{RANK}.jsonl")
        logits = model(tokens).float()
        if torch.is_grad_enabled() and self.inject == "before" and (RANK, self.calls) == self._when():
            logits.register_hook(lambda gradient: gradient * float("inf"))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)
        if self.loss == "broken":
            loss = loss * float("nan")
        return LossOutput(loss, (targets != -100).sum())

    def _when(self):
        return self.inject_rank, self.inject_call


def _write_hash(model, path: Path) -> None:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        value = parameter.detach()
        value = value.to_local() if isinstance(value, DTensor) else value
        digest.update(value.float().contiguous().numpy().tobytes())
    with path.open("a") as file:
        file.write(json.dumps(digest.hexdigest()) + "\n")


def _part_from_the_others(job: Padded) -> None:
    """Halve one rank's loss scale, as a bit that has flipped might."""
    real = loss_scale.DynamicLossScale.update

    def update(self, found_inf):
        real(self, found_inf)
        if (RANK, job.calls) == job._when():
            self.scale.mul_(0.5)

    loss_scale.DynamicLossScale.update = update


def _spoil_after_the_wire(job: Padded) -> None:
    """Make one gradient of one rank infinite between the wire and the measure."""
    real = control.ControlCollective.agree

    def spoiled(self, gradients, *arguments, **options):
        if (RANK, job.calls) == job._when():
            next(gradient for gradient in gradients if gradient.numel()).view(-1)[0] = float("inf")
        return real(self, gradients, *arguments, **options)

    control.ControlCollective.agree = spoiled

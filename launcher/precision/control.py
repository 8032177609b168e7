"""The one collective of a step: what every rank must know of all ranks, in one small vector.

Each rank measures its gradients once, packs the measure with its loss, items and votes into one float64
vector, and one SUM all-reduce makes it everybody's. Float64 keeps item counts exact up to 2^53, and the
loss of a billion tokens; the vector's size is ``10 + 2 world_size`` numbers, whatever the model's.

The result stays on the device for the step, and is copied to the host without blocking: the loop reads
the previous step's copy. All ranks read the same numbers, and so take the same decisions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["NO_VOTES", "Agreement", "CheckpointVotes", "ControlCollective", "Sums"]

_SQUARED_NORM, _NON_FINITE, _LOSS, _ITEMS, _STOP_VOTES, _LOST, _ENCODED = range(7)
_SAVE_VOTES, _DONE_VOTES, _FAILED_VOTES, _DIGESTS = range(7, 11)


@dataclass(frozen=True)
class Sums:
    """One rank's sums over the micro-batches of a step, as float64 scalars on the device."""

    loss: Tensor
    items: Tensor


@dataclass(frozen=True)
class CheckpointVotes:
    """What one rank says of checkpoints."""

    save: bool = False
    """The clock says that it is time for one."""
    done: bool = False
    """My part of the one that is being written is done."""
    failed: bool = False
    """It could not be written."""


NO_VOTES = CheckpointVotes()


@dataclass(frozen=True)
class Agreement:
    """The same on every rank: sums over all ranks, float64 scalars on the device."""

    squared_norm: Tensor
    """Σ g² over all gradient elements as they are: scaled, not normalised."""
    non_finite: Tensor
    """Parameters whose gradient is not finite (each counted once per replica's share)."""
    loss: Tensor
    items: Tensor
    stop_votes: Tensor
    """Ranks that have been asked to stop."""
    lost: Tensor
    """Σ over what encoding has lost on the wire, squared; 0 in steps that do not measure it."""
    encoded: Tensor
    """Σ over what was encoded, squared."""
    checkpoint_votes: Tensor
    """(3,): ranks that say so of each field of ``CheckpointVotes``."""
    digests: Tensor
    """(world_size,): every rank's digest of its (step, loss scale, learning rate)."""
    origins: Tensor
    """(world_size,): buckets of each rank that were not finite before they crossed the wire."""
    norms: Tensor
    """(gradients,): this rank's own measure, FP32, not agreed on; empty without gradients."""


class ControlCollective:
    """Measures, packs and agrees. Every rank calls ``agree`` once per step.

    Args:
        device: where the gradients live.
        world_size, rank: of the default process group; 1 needs no process group.
    """

    def __init__(self, device: torch.device, world_size: int, rank: int) -> None:
        self._device = device
        self._world_size = world_size
        self._rank = rank
        self._vector = torch.zeros(_DIGESTS + 2 * world_size, dtype=torch.float64, device=device)

    def agree(
        self,
        gradients: list[Tensor],
        sums: Sums,
        digest: Tensor,
        stop: bool,
        share: float = 1.0,
        origin: Tensor | None = None,
        lost: Tensor | None = None,
        checkpoint: CheckpointVotes = NO_VOTES,
    ) -> Agreement:
        """One read pass over ``gradients``, one all-reduce.

        Args:
            gradients: this rank's gradients, as they came off the wire.
            sums: this rank's loss and items.
            digest: float64 scalar that must be the same on all ranks.
            stop: this rank's vote to stop after this step.
            share: what this rank adds to the sums over the gradients: 1 / replicas of each gradient.
            origin: how many of this rank's buckets were not finite before the wire, float64 scalar.
            lost: this rank's sums of squares over what encoding has lost, and over what was encoded, float64 (2,).
            checkpoint: this rank's votes on checkpoints.
        """
        vector = self._vector.zero_()
        norms = torch.stack(torch._foreach_norm(gradients)) if gradients else vector.new_zeros(0)
        if gradients:
            vector[_SQUARED_NORM] = norms.double().square().sum() * share
            vector[_NON_FINITE] = (~norms.isfinite()).sum() * share
        vector[_LOSS] = sums.loss
        vector[_ITEMS] = sums.items
        vector[_STOP_VOTES] = float(stop)
        if lost is not None:
            vector[_LOST : _ENCODED + 1] = lost
        vector[_SAVE_VOTES] = float(checkpoint.save)
        vector[_DONE_VOTES] = float(checkpoint.done)
        vector[_FAILED_VOTES] = float(checkpoint.failed)
        vector[_DIGESTS + self._rank] = digest
        if origin is not None:
            vector[_DIGESTS + self._world_size + self._rank] = origin
        if self._world_size > 1:
            dist.all_reduce(vector)
        agreed = vector.clone()
        squared_norm, non_finite, loss, items, stop_votes, all_lost, encoded = agreed[:_SAVE_VOTES].unbind()
        digests, origins = torch.split(agreed[_DIGESTS:], self._world_size)
        return Agreement(
            squared_norm,
            non_finite,
            loss,
            items,
            stop_votes,
            all_lost,
            encoded,
            agreed[_SAVE_VOTES:_DIGESTS],
            digests,
            origins,
            norms,
        )

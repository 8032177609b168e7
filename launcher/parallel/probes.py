"""Whether this rank's own gradients were finite before they were mixed with the others'.

After the wire a non-finite gradient is everybody's. The probe reads each bucket once on its way to the wire,
while the backward pass still runs, and leaves one number on the device. A SUM over a bucket would do, but
finite values can overflow in it; a norm in FP32 can as well, only far above FP16's range.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

__all__ = ["OverflowProbe"]

# DDP looks at the annotations of a hook, which must be types: no postponed annotations in this file.
# torch 2.13 has a new name and deprecates the old one, which is all that 2.11 has.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class OverflowProbe:
    """Counts the buckets of a step that held a non-finite value."""

    def __init__(self, device: torch.device) -> None:
        self._count = torch.zeros((), dtype=torch.float64, device=device)

    def take(self) -> Tensor:
        """The count since the last call, as a float64 scalar on the device."""
        count = self._count.clone()
        self._count.zero_()
        return count

    def look(self, bucket: Tensor) -> None:
        """Read a bucket."""
        if bucket.numel():
            self._count.add_(~torch.linalg.vector_norm(bucket).isfinite())

    def watch_replicated(self, model: DistributedDataParallel) -> None:
        """Look at DDP's buckets; they are then summed, not averaged: the division would be another pass."""
        model.register_comm_hook(self, _sum_bucket)

    def watch_sharded(self, module: FSDPModule) -> None:
        """Look at the input of a module's reduce-scatter."""
        module.set_custom_reduce_scatter(_ProbedReduceScatter(self))  # type: ignore[arg-type]  # by duck typing


def _sum_bucket(probe: OverflowProbe, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    gradients = bucket.buffer()
    probe.look(gradients)
    work = dist.all_reduce(gradients, async_op=True)
    assert work is not None
    summed: torch.futures.Future[Tensor] = work.get_future().then(lambda future: future.value()[0])
    return summed


class _ProbedReduceScatter:
    """torch's own reduce-scatter, with a look at its input; see ``FSDPModule.set_custom_reduce_scatter``."""

    def __init__(self, probe: OverflowProbe) -> None:
        self._probe = probe

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        self._probe.look(input_tensor)
        return _reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)

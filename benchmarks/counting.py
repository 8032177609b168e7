"""Counting what a step does: collectives, bytes, waits for the device, passes over the gradients.

Every operation of torch's dispatcher is seen, those of DDP's reducer and inside DTensors included. What
happens inside one operation is not: a fused optimizer is one pass, as it is one kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Counts", "HostSyncError", "RefuseHostSyncs", "counted_steps", "counting", "is_host_sync"]

_CONTROL_BYTES = 4096
"""A collective of more than this carries gradients or weights."""
_VALUES_TO_HOST = {
    "_local_scalar_dense",
    "_unique2",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
"""Operations whose result, or its shape, the host waits for."""


@dataclass
class Counts:
    """Of one rank, over some steps; divide for one step's."""

    control_collectives: float = 0
    gradient_collectives: float = 0
    """Of gradients, and of weights where they are sharded."""
    control_bytes: float = 0
    """Sent by one rank if the backend is ideal: 2 (N-1)/N of an all-reduce, (N-1)/N of its halves."""
    gradient_bytes: float = 0
    host_syncs: float = 0
    gradient_passes: float = 0
    """Between the last backward and the end of the step; one operation that reads, writes or does both is one."""
    probe_passes: float = 0
    """Norms taken during backward, over all gradient elements of a rank."""

    def per_step(self, steps: int) -> Counts:
        """The mean."""
        return Counts(*(getattr(self, field.name) / steps for field in fields(self)))


class HostSyncError(AssertionError):
    """The host has waited for the device."""


def is_host_sync(func: Any, args: Any, result: Any = None) -> bool:
    """Whether an operation makes the host wait for the device, or would on a device that is not the CPU."""
    name = func.overloadpacket.__name__
    if func.namespace == "aten" and name in _VALUES_TO_HOST:
        return True
    source = args[1] if name == "copy_" else args[0] if name == "_to_copy" else None
    target = args[0] if name == "copy_" else result
    moved = isinstance(source, Tensor) and isinstance(target, Tensor) and source.device != target.device
    return moved and target.device.type == "cpu"


class RefuseHostSyncs(TorchDispatchMode):
    """Raises HostSyncError on an operation that waits for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_host_sync(func, args, result):
            raise HostSyncError(f"{func} waits for the device")
        return result


@contextmanager
def counting(parameters: Iterable[Tensor], world_size: int) -> Iterator[Counts]:
    """Count what happens inside; leave the block once the optimizer has stepped.

    Args:
        parameters: whose gradients to watch.
        world_size: of the group that the collectives run in.
    """
    counter = _Counter(list(parameters), world_size)
    real = torch.autograd.backward

    def backward(*args: Any, **kwargs: Any) -> None:
        with counter.in_backward():
            real(*args, **kwargs)

    torch.autograd.backward = backward
    try:
        with counter:
            yield counter.counts
    finally:
        torch.autograd.backward = real


class _Counter(TorchDispatchMode):
    def __init__(self, parameters: list[Tensor], world_size: int) -> None:
        super().__init__()
        self.counts = Counts()
        self._parameters = parameters
        self._factor = (world_size - 1) / world_size
        self._elements = sum(parameter.numel() for parameter in parameters)
        self._gradients: list[Tensor] = []  # kept, so that their memory is not given to somebody else
        self._spans: list[tuple[int, int]] = []
        self._in_backward = False

    @contextmanager
    def in_backward(self) -> Iterator[None]:
        self._in_backward, self._spans, self._gradients = True, [], []
        yield
        self._in_backward = False
        found = (parameter.grad for parameter in self._parameters)
        local = (gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in found)
        self._gradients = [gradient for gradient in local if gradient is not None]
        self._spans = [_span(gradient) for gradient in self._gradients]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # and be asked again for each operation that it is made of
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count_collective(func.overloadpacket.__name__, tensors)
        elif is_host_sync(func, args, result):
            self.counts.host_syncs += 1
        elif not func.is_view:
            self._count_passes(func.overloadpacket.__name__, tensors)
        return result

    def _count_collective(self, name: str, tensors: list[Tensor]) -> None:
        if "wait" in name or "barrier" in name or not tensors:
            return
        kind = name.replace("_", "")
        sizes = [tensor.nbytes for tensor in tensors]
        payload = sum(sizes) if "allreduce" in kind else max(sizes)
        sent = payload * self._factor * (2 if "allreduce" in kind else 1)
        if payload <= _CONTROL_BYTES:
            self.counts.control_collectives += 1
            self.counts.control_bytes += sent
        else:
            self.counts.gradient_collectives += 1
            self.counts.gradient_bytes += sent

    def _count_passes(self, name: str, tensors: list[Tensor]) -> None:
        if self._in_backward:
            if name == "linalg_vector_norm":
                self.counts.probe_passes += sum(tensor.numel() for tensor in tensors) / self._elements
            return
        if self._spans:
            touched = sum(_overlap(_span(tensor), span) for tensor in tensors for span in self._spans)
            self.counts.gradient_passes += touched / sum(end - start for start, end in self._spans)


def _span(tensor: Tensor) -> tuple[int, int]:
    start = tensor.data_ptr()
    return start, start + tensor.nbytes


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> int:
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))


def counted_steps(step: Callable[[], object], parameters: Iterable[Tensor], world_size: int, steps: int = 3) -> Counts:
    """One step's counts in the steady state: the mean of some, after two that are not counted."""
    for _ in range(2):
        step()
    with counting(parameters, world_size) as counts:
        for _ in range(steps):
            step()
    return counts.per_step(steps)

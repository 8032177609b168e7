"""Which rank writes what, and the one copy of it in host memory that is written while training goes on.

The plan is DCP's: every piece is written once, and what several ranks hold is spread over them. It is made once,
as the state's shapes stay the same, and again should they change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from launcher.checkpoint.snapshot import local_part

__all__ = ["Stage", "WritePlan", "make_plan"]


@dataclass(frozen=True)
class WritePlan:
    """This rank's share of the writing."""

    shapes: dict[str, Any]
    """Of the state that it was made for, by name."""
    items: SavePlan
    """What this rank writes."""
    metadata: Metadata | None
    """Of all that is written; on rank 0."""

    @property
    def names(self) -> list[str]:
        """The tensors of which this rank writes its part."""
        return [item.index.fqn for item in self.items.items]

    def fits(self, tensors: dict[str, Tensor]) -> bool:
        """Whether it is the plan for this state."""
        return self.shapes == _shapes(tensors)


def make_plan(tensors: dict[str, Tensor], rank: int, world_size: int) -> WritePlan:
    """Agree on who writes what; collective."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    # Detached: that something requires a gradient does not belong into the layout on the disk.
    planner.set_up_planner({name: tensor.detach() for name, tensor in tensors.items()}, is_coordinator=rank == 0)
    local = planner.create_local_plan()
    # Ranks beyond the last row of a small tensor hold nothing of it.
    local = SavePlan([item for item in local.items if not _is_empty(item)])
    plans: list[Any] = [None] * world_size
    final, metadata = [local], None
    if world_size > 1:
        dist.gather_object(local, plans if rank == 0 else None)
    else:
        plans = [local]
    if rank == 0:
        final, metadata = planner.create_global_plan(plans)
    if world_size > 1:
        received: list[Any] = [None]
        dist.scatter_object_list(received, final if rank == 0 else None)
        final = received
    return WritePlan(_shapes(tensors), final[0], metadata)


def _is_empty(item: Any) -> bool:
    whole, part = item.tensor_data.size, item.tensor_data.chunk.sizes
    return bool(part.numel() == 0 and whole.numel() > 0)


def _shapes(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: (local_part(tensor).shape, tensor.dtype) for name, tensor in tensors.items()}


class Stage:
    """Buffers in host memory, pinned where there is a GPU, used again for every checkpoint."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def prepare(self, tensors: dict[str, Tensor]) -> None:
        """Have memory for ``tensors`` (plain ones) and nothing else, and have the kernel really give it."""
        self._buffers = {
            name: kept if (kept := self._buffers.get(name)) is not None and _alike(kept, tensor) else self._new(tensor)
            for name, tensor in tensors.items()
        }

    def _new(self, tensor: Tensor) -> Tensor:
        pinned = self._device.type == "cuda"
        return torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)

    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The values of ``tensors``, which may change as soon as this returns."""
        if any(
            not _alike(self._buffers[name], tensor) for name, tensor in tensors.items() if name in self._buffers
        ) or (tensors.keys() != self._buffers.keys()):
            self.prepare(tensors)
        if tensors:
            buffers = [self._buffers[name] for name in tensors]
            torch._foreach_copy_(buffers, list(tensors.values()), non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return {name: self._buffers[name] for name in tensors}

    def copy_tree(self, value: Any) -> Any:
        """A nested value with a copy of each tensor in it; its numbers and strings as they are."""
        found: dict[str, Tensor] = {}

        def collect(node: Any, path: str) -> Any:
            if isinstance(node, Tensor):
                found[path] = node.detach()
                return _Place(path)
            if isinstance(node, dict):
                return {key: collect(entry, f"{path}[{key!r}]") for key, entry in node.items()}
            if isinstance(node, (list, tuple)):
                return type(node)(collect(entry, f"{path}[{index}]") for index, entry in enumerate(node))
            return node

        skeleton = collect(value, "")
        copies = self.copy(found)

        def fill(node: Any) -> Any:
            if isinstance(node, _Place):
                return copies[node.path]
            if isinstance(node, dict):
                return {key: fill(entry) for key, entry in node.items()}
            if isinstance(node, (list, tuple)):
                return type(node)(fill(entry) for entry in node)
            return node

        return cast("Any", fill(skeleton))


@dataclass(frozen=True)
class _Place:
    """Where a tensor was."""

    path: str


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype

"""What the optimizer steps: a parameter, or this rank's shard of it as a plain tensor.

An optimizer that treats each element by itself does the same to a shard as to the whole. Given plain
shards it needs no sharding rule for its fused kernel (SGD has none) and no dispatch through DTensor.
Others (which look at rows, columns or norms) get the DTensors and do as torch has taught them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["SteppedParameters", "is_elementwise"]

_ELEMENTWISE = frozenset(
    {
        torch.optim.Adadelta,
        torch.optim.Adagrad,
        torch.optim.Adam,
        torch.optim.Adamax,
        torch.optim.AdamW,
        torch.optim.ASGD,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        torch.optim.SGD,
    }
)


def is_elementwise(optimizer: Any) -> bool:
    """Whether an optimizer's class is known to treat each element of a parameter by itself."""
    return optimizer in _ELEMENTWISE


class SteppedParameters:
    """Shards as plain parameters, which share their memory with the model's DTensors."""

    def __init__(self) -> None:
        self._sources: dict[Tensor, DTensor] = {}

    def local(self, groups: Iterable[Any]) -> list[Any]:
        """``groups`` as ``Job.parameter_groups`` returns them, with plain shards in place of DTensors."""
        shards: dict[Tensor, Tensor] = {}

        def shard(value: Any) -> Any:
            if isinstance(value, DTensor):
                if value not in shards:
                    shards[value] = nn.Parameter(
                        cast("DTensor", value.detach()).to_local(), requires_grad=value.requires_grad
                    )
                    self._sources[shards[value]] = value
                return shards[value]
            if isinstance(value, tuple):  # (name, parameter)
                return tuple(shard(item) for item in value)
            if isinstance(value, dict):
                members = value["params"]
                members = [members] if isinstance(members, Tensor) else list(members)
                return {**value, "params": [shard(member) for member in members]}
            return value

        return [shard(group) for group in groups]

    def source(self, target: Tensor) -> Tensor:
        """The model's parameter behind what is stepped."""
        return self._sources.get(target, target)

    def bind_gradients(self, optimizer: torch.optim.Optimizer) -> list[Tensor | None]:
        """Give each shard its gradient; return all as plain tensors, None where there is none."""
        gradients: list[Tensor | None] = []
        with torch.no_grad():
            for group in optimizer.param_groups:
                for target in group["params"]:
                    gradient = self.source(target).grad
                    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
                    if target in self._sources:
                        target.grad = local
                    gradients.append(local)
        return gradients

    def zero_grad(self) -> None:
        """Forget the model's gradients too."""
        for source in self._sources.values():
            source.grad = None

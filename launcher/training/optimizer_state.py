"""An optimizer's state, by the parameter's name: it is read where it is; ``optimizer_restoring`` takes it up again.

torch's ``get_optimizer_state_dict`` makes a step to find out what there is, and so changes what it looks at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from launcher.checkpoint.snapshot import local_part, plain
from launcher.errors import JobError
from launcher.training.step import Learner

__all__ = ["PREFIX", "groups", "laid_out_like", "listed", "numbers", "state_entries", "stepped_by", "tensors"]

PREFIX = "optimizer."
_SHOWN = 5


def tensors(learner: Learner) -> dict[str, Tensor]:
    """Every entry that is a tensor, under ``optimizer.<parameter>.<entry>``; not copied.

    Raises:
        JobError: something has no name, or is not a tensor or number.
    """
    return {
        f"{PREFIX}{name}.{key}": laid_out_like(value, source)
        for name, source, key, value in state_entries(learner)
        if isinstance(value, Tensor)
    }


def numbers(learner: Learner) -> dict[str, Any]:
    """Every entry that is a Python number, by the name that a tensor would have."""
    found = state_entries(learner)
    return {f"{name}.{key}": value for name, _, key, value in found if not isinstance(value, Tensor)}


def groups(learner: Learner) -> list[dict[str, Any]]:
    """By group: what the optimizer has changed in it since it was built, beside the rate; not copied.

    Raises:
        JobError: an entry could not be loaded safely.
    """
    found = learner.optimizer.group_state.changed()
    kind = type(learner.optimizer.optimizer).__name__
    for index, group in enumerate(found):
        for key, value in group.items():
            if isinstance(value, DTensor):
                raise JobError(
                    f"{kind}.param_groups[{index}][{key!r}] is a DTensor, which a checkpoint does not hold there: "
                    "use parallel=ddp, another optimizer, or checkpoint=none."
                )
    return [plain(group, f"{kind}.param_groups[{index}]") for index, group in enumerate(found)]


def listed(names: Iterable[str]) -> str:
    """The first few of some names."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more


def stepped_by(learner: Learner) -> list[Tensor]:
    """What the optimizer steps, in its order."""
    return [target for group in learner.optimizer.optimizer.param_groups for target in group["params"]]


def state_entries(learner: Learner) -> Iterator[tuple[str, Tensor, str, Any]]:
    """Each entry of the optimizer's state: parameter's name, the parameter, key, value."""
    optimizer = learner.optimizer
    _refuse_state_beside_parameters(optimizer.optimizer)
    for name, target in zip(learner.parameter_names, stepped_by(learner), strict=True):
        if name == "?":
            raise JobError(
                f"{type(learner.job).__name__}.parameter_groups returned a parameter that is not one of the model's, "
                "and so has no name to be saved under: make it a part of the model, or use checkpoint=none."
            )
        for key, value in sorted(optimizer.optimizer.state.get(target, {}).items()):
            if "." in key:  # where the parameter's name ends could not be told
                raise JobError(f"{type(optimizer.optimizer).__name__} keeps {key!r}: use a key without a dot.")
            if value is None:
                continue
            if not isinstance(value, (Tensor, bool, int, float)):
                raise JobError(
                    f"{type(optimizer.optimizer).__name__} keeps {key!r} as a {type(value).__name__}, which a "
                    "checkpoint does not hold: use another optimizer, or checkpoint=none."
                )
            yield name, optimizer.stepped.source(target), key, value


def _refuse_state_beside_parameters(optimizer: torch.optim.Optimizer) -> None:
    """What is neither a parameter's nor a group's has no place in a checkpoint, and the run would go on without it.

    Raises:
        JobError: naming it.
    """
    beside = [repr(key) for key in optimizer.state if not isinstance(key, Tensor)]
    if type(optimizer).state_dict is not torch.optim.Optimizer.state_dict:
        beside += map(repr, optimizer.state_dict().keys() - {"state", "param_groups"})
    if beside:
        raise JobError(
            f"{type(optimizer).__name__} keeps {listed(beside)} beside its parameters' state, which a checkpoint does "
            "not hold: keep it in param_groups or in each parameter's state, or use checkpoint=none."
        )


def laid_out_like(value: Tensor, source: Tensor) -> Tensor:
    """A shard of optimizer state as the DTensor that its parameter is; anything else as it is."""
    if isinstance(source, DTensor) and not isinstance(value, DTensor) and value.ndim:
        shard = local_part(source)
        if value.shape == shard.shape:
            return DTensor.from_local(
                value,
                source.device_mesh,
                source.placements,
                run_check=False,
                shape=source.shape,
                stride=source.stride(),
            )
    return value.detach()

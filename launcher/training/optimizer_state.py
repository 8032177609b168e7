"""An optimizer's state, by the parameter's name: where it is read and written is where it is.

torch's ``get_optimizer_state_dict`` makes a step to find out what there is, and so changes what it looks at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from launcher.checkpoint.loading import TensorFacts
from launcher.checkpoint.snapshot import local_part, plain
from launcher.errors import JobError
from launcher.training.likeness import require_like
from launcher.training.step import Learner

__all__ = [
    "check_groups",
    "groups",
    "listed",
    "load",
    "load_groups",
    "numbers",
    "targets",
    "tensors",
]

_PREFIX = "optimizer."
_SHOWN = 5


def tensors(learner: Learner) -> dict[str, Tensor]:
    """Every entry that is a tensor, under ``optimizer.<parameter>.<entry>``; not copied.

    Raises:
        JobError: something has no name, or is not a tensor or number.
    """
    entries = _entries(learner)
    return {
        f"{_PREFIX}{name}.{key}": _laid_out_like(value, source)
        for name, source, key, value in entries
        if isinstance(value, Tensor)
    }


def numbers(learner: Learner) -> dict[str, Any]:
    """Every entry that is a Python number, by the name that a tensor would have."""
    entries = _entries(learner)
    return {f"{name}.{key}": value for name, _, key, value in entries if not isinstance(value, Tensor)}


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


def targets(
    learner: Learner,
    saved_kind: str,
    facts: dict[str, TensorFacts],
    saved_numbers: dict[str, Any],
    notes: list[str],
) -> dict[Tensor, dict[str, Tensor]]:
    """By what is stepped: a tensor to read for each saved entry of its state, by the name it was saved under.

    Args:
        learner: freshly built.
        saved_kind: the class of the optimizer that was saved.
        facts: of everything that was saved.
        saved_numbers: see ``numbers``.
        notes: gets what is left out, in words.

    Raises:
        ValueError: an entry is not what this optimizer would have there.
    """
    optimizer = learner.optimizer
    ours = type(optimizer.optimizer).__name__
    by_name: dict[str, dict[str, TensorFacts]] = {}
    for full, fact in facts.items():
        if full.startswith(_PREFIX):
            by_name.setdefault(full.removeprefix(_PREFIX).rpartition(".")[0], {})[full] = fact
    if ours != saved_kind:
        notes.append(f"the optimizer's state is left out: it is that of {saved_kind}, and this is {ours}")
        return {}
    entries = {full.removeprefix(_PREFIX): fact for full, fact in facts.items() if full.startswith(_PREFIX)}
    if new := _require_fit(learner, {**entries, **saved_numbers}):
        notes.append(f"the optimizer did not keep {listed(new)}, which begins anew")
    found: dict[Tensor, dict[str, Tensor]] = {}
    for name, target in zip(learner.parameter_names, _stepped(learner), strict=True):
        source = optimizer.stepped.source(target)
        found[target] = {
            full: _empty_like(source, fact) if fact.shape == source.shape else torch.empty(fact.shape, dtype=fact.dtype)
            for full, fact in by_name.pop(name, {}).items()
        }
    if by_name:
        notes.append(f"the optimizer's state is left out of what is not trained now: {listed(by_name)}")
    return found


def _require_fit(learner: Learner, saved: dict[str, TensorFacts | float]) -> set[str]:
    """See that saved entries are like those that the optimizer has been built with, as far as it has been.

    Returns:
        Entries that were not kept then, for all parameters or for the one that is named.
    """
    new = set()
    kept = {full.rpartition(".")[2] for full in saved}
    of_parameters = {full.rpartition(".")[0] for full in saved}
    for name, source, key, value in _entries(learner):
        full = f"{name}.{key}"
        if full in saved:
            built = _laid_out_like(value, source) if isinstance(value, Tensor) else value
            require_like(saved[full], built, f"the optimizer's {full}")
        elif name in of_parameters:
            new.add(full if key in kept else key)
    return new


def _empty_like(source: Tensor, fact: TensorFacts) -> Tensor:
    return torch.zeros_like(source.detach(), dtype=fact.dtype)


def load(learner: Learner, state: dict[Tensor, dict[str, Tensor]], saved_numbers: dict[str, Any]) -> None:
    """Take up what has been read into ``targets``; what the optimizer keeps in its groups is left as it is.

    By torch's own loading, which knows on which device each entry belongs; but it gives all of them the parameter's
    type, and an optimizer may keep counts, flags, or sums of another precision.
    """
    if not state:
        return
    optimizer = learner.optimizer
    entries: dict[int, dict[str, Any]] = {}
    for index, (name, target) in enumerate(zip(learner.parameter_names, _stepped(learner), strict=True)):
        stepped_locally = optimizer.stepped.source(target) is not target
        entry: dict[str, Any] = {
            full.rpartition(".")[2]: local_part(value) if stepped_locally else value
            for full, value in state[target].items()
        }
        entry |= {full.rpartition(".")[2]: n for full, n in saved_numbers.items() if full.rpartition(".")[0] == name}
        if entry:
            entries[index] = {**optimizer.optimizer.state.get(target, {}), **entry}
    kept = optimizer.optimizer.state_dict()["param_groups"]
    optimizer.optimizer.load_state_dict({"state": entries, "param_groups": kept})
    stepped = _stepped(learner)
    for index, entry in entries.items():
        loaded = optimizer.optimizer.state[stepped[index]]
        for key, value in entry.items():
            if isinstance(value, Tensor) and loaded[key].dtype != value.dtype:
                loaded[key] = value.to(loaded[key].device)


def check_groups(learner: Learner, saved: list[Any], saved_kind: str) -> None:
    """See that what ``groups`` has found is like what is in the groups now, if it is this optimizer's.

    Raises:
        ValueError: naming what is not.
    """
    optimizer = learner.optimizer.optimizer
    if type(optimizer).__name__ != saved_kind or len(saved) != len(optimizer.param_groups):
        return
    for index, (group, entries) in enumerate(zip(optimizer.param_groups, saved, strict=True)):
        for key, value in entries.items():
            name = f"{saved_kind}.param_groups[{index}][{key!r}]"
            built = group.get(key)
            is_number = isinstance(built, (int, float))
            if is_number and isinstance(value, Tensor) and value.numel() == 1:
                continue  # what an optimizer keeps on the device once it has begun
            if value is not None or is_number or isinstance(built, Tensor):
                require_like(value, built, name)


def load_groups(learner: Learner, saved: list[dict[str, Any]], saved_kind: str, notes: list[str]) -> None:
    """Take up what ``groups`` has found.

    Args:
        learner: freshly built.
        saved: one dict for each group, tensors on the CPU.
        saved_kind: the class of the optimizer that was saved; another one's are left out.
        notes: gets what is left out, in words.
    """
    optimizer = learner.optimizer.optimizer
    if type(optimizer).__name__ != saved_kind or not any(saved):
        return
    if len(saved) != len(optimizer.param_groups):
        notes.append(
            f"what {saved_kind} keeps in its parameter groups ({listed({key for entry in saved for key in entry})}) "
            f"begins anew: they were {len(saved)} and are {len(optimizer.param_groups)}"
        )
        return
    for group, entries in zip(optimizer.param_groups, saved, strict=True):
        for key, value in entries.items():
            built = group.get(key)
            device = built.device if isinstance(built, Tensor) else learner.device
            group[key] = value.to(device) if isinstance(value, Tensor) else value


def listed(names: Iterable[str]) -> str:
    """The first few of some names."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more


def _stepped(learner: Learner) -> list[Tensor]:
    """What the optimizer steps, in its order."""
    return [target for group in learner.optimizer.optimizer.param_groups for target in group["params"]]


def _entries(learner: Learner) -> Iterator[tuple[str, Tensor, str, Any]]:
    """Each entry of the optimizer's state: parameter's name, the parameter, key, value."""
    optimizer = learner.optimizer
    _refuse_state_beside_parameters(optimizer.optimizer)
    for name, target in zip(learner.parameter_names, _stepped(learner), strict=True):
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


def _laid_out_like(value: Tensor, source: Tensor) -> Tensor:
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

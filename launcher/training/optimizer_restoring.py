"""Taking up an optimizer's state: what was saved is compared with what is there now, and read into it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from launcher.checkpoint.loading import TensorFacts
from launcher.checkpoint.snapshot import local_part
from launcher.training.likeness import require_like
from launcher.training.optimizer_state import PREFIX, laid_out_like, listed, state_entries, stepped_by
from launcher.training.step import Learner

__all__ = ["check_groups", "load", "load_groups", "targets"]


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
        if full.startswith(PREFIX):
            by_name.setdefault(full.removeprefix(PREFIX).rpartition(".")[0], {})[full] = fact
    if ours != saved_kind:
        notes.append(f"the optimizer's state is left out: it is that of {saved_kind}, and this is {ours}")
        return {}
    entries = {full.removeprefix(PREFIX): fact for full, fact in facts.items() if full.startswith(PREFIX)}
    if new := _require_fit(learner, {**entries, **saved_numbers}):
        notes.append(f"the optimizer did not keep {listed(new)}, which begins anew")
    found: dict[Tensor, dict[str, Tensor]] = {}
    for name, target in zip(learner.parameter_names, stepped_by(learner), strict=True):
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
    for name, source, key, value in state_entries(learner):
        full = f"{name}.{key}"
        if full in saved:
            built = laid_out_like(value, source) if isinstance(value, Tensor) else value
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
    for index, (name, target) in enumerate(zip(learner.parameter_names, stepped_by(learner), strict=True)):
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
    stepped = stepped_by(learner)
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

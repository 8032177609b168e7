"""What a learner's state is: how it is taken apart for a checkpoint, and put together again.

Everything by the parameter's name, so that it fits any strategy and any number of ranks.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from launcher.checkpoint import Checkpoint
from launcher.checkpoint.loading import TensorFacts, read_private, read_tensors, tensor_facts
from launcher.checkpoint.snapshot import local_part, require_plain
from launcher.checkpoint.weights import MODEL_PREFIX
from launcher.errors import CheckpointError, JobError
from launcher.precision import DynamicLossScale
from launcher.training import generators, optimizer_state
from launcher.training.batches import Data
from launcher.training.step import Learner

__all__ = ["aliases", "private_state", "restore", "shared_tensors"]

_PRIVATE = {
    "random": dict,
    "buffers": dict,
    "extra": dict,
    "data": dict,
    "job": dict,
    "wire": dict,
    "optimizer_groups": list,
}
"""What every rank's own file has."""


def shared_tensors(learner: Learner, rank: int) -> dict[str, Tensor]:
    """What the ranks save together: weights, persistent buffers (the first rank's), optimizer state; not copied.

    Raises:
        JobError: something has no name, or is not a tensor or number.
    """
    model = learner.model.module
    tensors: dict[str, Tensor] = {MODEL_PREFIX + name: parameter for name, parameter in model.named_parameters()}
    if rank == 0:
        tensors |= {MODEL_PREFIX + name: buffer.detach() for name, buffer in _persistent_buffers(model).items()}
    return tensors | optimizer_state.tensors(learner)


def aliases(model: nn.Module) -> dict[str, str]:
    """Other names of tied parameters and buffers, to the name that they are saved under."""
    first: dict[Tensor, str] = {}
    found = {}
    everything = [
        *model.named_parameters(remove_duplicate=False),
        *((name, buffer) for name, buffer in model.named_buffers(remove_duplicate=False)),
    ]
    for name, tensor in everything:
        if first.setdefault(tensor, name) != name:
            found[name] = first[tensor]
    return found


def private_state(learner: Learner, data: Data) -> dict[str, Any]:
    """What is this rank's own: random generators, buffers, its place in a stream, the job's state, optimizer groups.

    Raises:
        JobError: the job, the dataset or the optimizer keep something that could not be loaded safely.
    """
    job = learner.job
    state: dict[str, Any] = {
        "random": generators.state(learner.device),
        "buffers": {name: buffer.detach() for name, buffer in _persistent_buffers(learner.model.module).items()},
        "extra": _extra_state(learner.model.module),
        "data": data.state_dict(),
        "job": job.state_dict() if hasattr(job, "state_dict") else {},
        "wire": learner.model.wire.state_dict(),
        "optimizer_groups": optimizer_state.groups(learner),
    }
    require_plain(state["extra"], "The model's extra state")
    require_plain(state["data"], "The state_dict of the training dataset")
    require_plain(state["job"], f"{type(job).__name__}.state_dict()")
    return state


def restore(learner: Learner, data: Data, checkpoint: Checkpoint, rank: int, world_size: int) -> list[str]:
    """Give a freshly built learner the state of a checkpoint; every rank reads what it needs, no collective.

    Returns:
        What was left out or begun anew, in words.

    Raises:
        CheckpointError: the checkpoint is not one of this model, or cannot be read.
        JobError: the data cannot go on at another number of ranks.
    """
    manifest = checkpoint.manifest
    notes: list[str] = []
    facts = tensor_facts(checkpoint)
    model = learner.model.module
    targets: dict[str, Tensor] = {MODEL_PREFIX + name: value for name, value in model.named_parameters()}
    targets |= {MODEL_PREFIX + name: buffer for name, buffer in _persistent_buffers(model).items()}
    _require_same_model(checkpoint, targets, facts)
    state = optimizer_state.targets(learner, checkpoint.manifest.state["optimizer"], facts, notes)
    read_tensors(checkpoint, targets | {name: target for entry in state.values() for name, target in entry.items()})
    optimizer_state.load(learner, state, manifest.state["optimizer_numbers"])
    _restore_loss_scale(learner, manifest.loss_scale, manifest.dtype, notes)
    learner.steps = manifest.step
    learner.schedule.applied_steps.fill_(manifest.applied_steps)
    learner.expected_items = manifest.state["expected_items"]
    _restore_private(learner, data, checkpoint, rank, world_size, notes)
    return notes


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    kept = model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def _extra_state(model: nn.Module) -> dict[str, Any]:
    """What modules keep through ``get_extra_state``, by the module's name."""
    found = {name.rpartition("."): value for name, value in model.state_dict(keep_vars=True).items()}
    return {module: value for (module, _, name), value in found.items() if name == "_extra_state"}


def _require_same_model(checkpoint: Checkpoint, targets: dict[str, Tensor], facts: dict[str, TensorFacts]) -> None:
    saved = {name: fact for name, fact in facts.items() if name.startswith(MODEL_PREFIX)}
    missing = sorted(targets.keys() - saved.keys())
    added = sorted(saved.keys() - targets.keys())
    other = [name for name in targets if name in saved and saved[name].shape != targets[name].shape]
    if not missing and not added and not other:
        return
    lines = [f"{checkpoint.path} is not of this model:"]
    for names, words in ((missing, "it lacks"), (added, "it has, and the model has not,")):
        if names:
            lines.append(f"  {words} {optimizer_state.listed(names)}")
    lines += [f"  {name} is {tuple(saved[name].shape)} there and {tuple(targets[name].shape)} here" for name in other]
    lines.append("Start a new run for another model (train.init_from takes weights that fit), or undo the change.")
    raise CheckpointError("\n".join(lines))


def _restore_loss_scale(learner: Learner, saved: dict[str, Any], saved_dtype: str, notes: list[str]) -> None:
    scaled = isinstance(learner.loss_scale, DynamicLossScale)
    if scaled and saved:
        try:
            learner.loss_scale.load_state_dict(saved)
        except ValueError as error:
            raise CheckpointError(f"The checkpoint cannot be loaded: {error}.") from error
    elif scaled:
        notes.append(
            f"the run was {saved_dtype} and had no loss scale: it starts at {float(learner.loss_scale.scale):g}"
        )
    elif saved:
        notes.append(f"the loss scale ({saved.get('scale', math.nan):g}) is left out: nothing is scaled now")


def _restore_private(
    learner: Learner, data: Data, checkpoint: Checkpoint, rank: int, world_size: int, notes: list[str]
) -> None:
    saved_world_size = checkpoint.manifest.world_size
    same = saved_world_size == world_size
    own = read_private(checkpoint, rank if same else 0)
    if any(not isinstance(own.get(name), kind) for name, kind in _PRIVATE.items()):
        raise CheckpointError(f"{checkpoint.path} cannot be loaded: a rank's own file does not hold what a rank saves.")
    if own["data"] and not same:
        raise JobError(
            f"{checkpoint.path} was saved on {saved_world_size} ranks and these are {world_size}: the training data is "
            "an IterableDataset, whose state is that of each rank alone. "
            f"Go on with {saved_world_size} ranks, or use a map-style dataset."
        )
    if gone := sorted(own["extra"].keys() - _extra_state(learner.model.module).keys()):
        raise CheckpointError(
            f"{checkpoint.path} is not of this model: it has the extra state of "
            f"{optimizer_state.listed(name or 'the model itself' for name in gone)}, where "
            "the model has none. Start a new run for another model, or undo the change."
        )
    for name, value in own["extra"].items():
        learner.model.module.get_submodule(name).set_extra_state(value)
    if own["data"]:
        data.load_state_dict(own["data"])
    if own["job"] and hasattr(learner.job, "load_state_dict"):
        learner.job.load_state_dict(own["job"])
    elif own["job"]:
        notes.append("the job's state is left out: it has no load_state_dict")
    if same:
        buffers = _persistent_buffers(learner.model.module)
        for name, value in own["buffers"].items():
            local_part(buffers[name]).copy_(local_part(value))
    optimizer_state.load_groups(learner, own["optimizer_groups"], checkpoint.manifest.state["optimizer"], notes)
    learner.model.wire.load_state_dict(lambda which: read_private(checkpoint, which)["wire"], saved_world_size)
    if same:  # last: the user's code above may draw
        generators.set_state(own["random"], learner.device)
    else:
        notes.append(f"saved on {saved_world_size} ranks: dropout and the like draw new random numbers on {world_size}")

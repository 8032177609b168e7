"""Putting a freshly built learner where a checkpoint was taken: all is read and looked at, and only then taken up.

Digests say that a checkpoint is what somebody wrote, not that T-minus did. What no learner would save is damage, and
the ranks can agree on an older checkpoint before any code of the user's has been given a part of it. What another
learner than this one could have saved is not: the user has changed something, and is told what, with every checkpoint
left in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from launcher.checkpoint import Checkpoint
from launcher.checkpoint.judging import looking_into
from launcher.checkpoint.loading import TensorFacts, rank_file, read_private, read_tensors, tensor_facts
from launcher.checkpoint.manifest import MANIFEST, is_count, is_number
from launcher.checkpoint.snapshot import local_part
from launcher.errors import CheckpointError, DamagedCheckpointError, JobError
from launcher.precision import DynamicLossScale
from launcher.training import generators, optimizer_restoring
from launcher.training.batches import Data
from launcher.training.likeness import fitting, kind, require_like
from launcher.training.optimizer_state import listed
from launcher.training.state import MODEL_PREFIX, extra_state, persistent_buffers
from launcher.training.step import Learner

__all__ = ["Reading", "read", "take_up"]

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
_STATE: dict[str, Callable[[Any], bool]] = {
    "best_of": lambda value: (
        value is None or (isinstance(value, list) and [type(word) for word in value] == [str, str])
    ),
    "consecutive_skips": is_count,
    "expected_items": lambda value: value is None or (is_number(value) and value > 0),
    "global_batch_size": lambda value: is_count(value) and value > 0,
    "num_samples": lambda value: value is None or is_count(value),
    "seed": lambda value: isinstance(value, int),
    "optimizer": lambda value: isinstance(value, str),
    "optimizer_numbers": lambda value: (
        isinstance(value, dict) and all(isinstance(n, (int, float)) for n in value.values())
    ),
}
"""What ``progress.take_snapshot`` puts into the manifest's ``state``."""


@dataclass(frozen=True)
class Reading:
    """What this rank has read of a checkpoint, and found to fit; weights and buffers are in the model already."""

    checkpoint: Checkpoint
    same_ranks: bool
    """Whether it was saved on as many."""
    own_rank: int
    """Whose file ``own`` is: this rank's, or the first's on another number of ranks."""
    own: dict[str, Any]
    """What belongs to that rank alone."""
    optimizer: dict[Tensor, dict[str, Tensor]]
    """See ``optimizer_restoring.targets``."""
    notes: list[str] = field(default_factory=list)
    """What is left out or begins anew, in words."""

    def wire_of(self, rank: int) -> dict[str, Tensor]:
        """What a rank's wire has kept."""
        own = self.own if rank == self.own_rank else read_private(self.checkpoint, rank)
        found: dict[str, Tensor] = own["wire"]
        return found


def read(learner: Learner, checkpoint: Checkpoint, rank: int, world_size: int) -> Reading:
    """Read and look at what this rank needs; no collective, and nothing of the user's is called.

    Raises:
        DamagedCheckpointError: the content is not what any learner saves.
        CheckpointError: it is not of this model or optimizer, or torch cannot load it as things are.
        OSError: a file cannot be read.
    """
    manifest, path = checkpoint.manifest, checkpoint.path
    same = manifest.world_size == world_size
    notes: list[str] = []
    _check_state(checkpoint)
    facts = tensor_facts(checkpoint)
    model = learner.model.module
    targets: dict[str, Tensor] = {MODEL_PREFIX + name: value for name, value in model.named_parameters()}
    targets |= {MODEL_PREFIX + name: buffer for name, buffer in persistent_buffers(model).items()}
    _require_same_model(checkpoint, targets, facts)
    with fitting(path):
        optimizer = optimizer_restoring.targets(
            learner, manifest.state["optimizer"], facts, manifest.state["optimizer_numbers"], notes
        )
    with looking_into(path, MANIFEST):
        _read_loss_scale(learner, manifest.loss_scale, manifest.dtype, notes)
        learner.schedule.applied_steps.fill_(manifest.applied_steps)
    read_tensors(checkpoint, targets | {name: target for entry in optimizer.values() for name, target in entry.items()})
    own_rank = rank if same else 0
    own = _read_own(learner, checkpoint, own_rank)
    with fitting(path):
        optimizer_restoring.check_groups(learner, own["optimizer_groups"], manifest.state["optimizer"])
    if same:
        with looking_into(path, rank_file(rank)):
            generators.check(own["random"], learner.device)
        with looking_into(path, rank_file(rank)), fitting(path):
            _check_buffers(learner, own["buffers"])
    else:  # the others' errors on the wire are wanted too: each rank looks at a share of them
        for other in range(rank, manifest.world_size, world_size):
            _read_own(learner, checkpoint, other)
    if gone := sorted(own["extra"].keys() - extra_state(model).keys()):
        raise CheckpointError(
            f"{path} is not of this model: it has the extra state of "
            f"{listed(name or 'the model itself' for name in gone)}, where "
            "the model has none. Start a new run for another model, or undo the change."
        )
    return Reading(checkpoint, same, own_rank, own, optimizer, notes)


def take_up(learner: Learner, data: Data, reading: Reading) -> list[str]:
    """Give the learner what has been read; collective, and calls what the user has written for it.

    Returns:
        What was left out or begun anew, in words.

    Raises:
        JobError: the data cannot go on at another number of ranks.
    """
    checkpoint, own, notes = reading.checkpoint, reading.own, reading.notes
    manifest, model = checkpoint.manifest, learner.model.module
    if own["data"] and not reading.same_ranks:
        raise JobError(
            f"{checkpoint.path} was saved on {manifest.world_size} ranks and these are {learner.world_size}: the "
            "training data is an IterableDataset, whose state is that of each rank alone. "
            f"Go on with {manifest.world_size} ranks, or use a map-style dataset."
        )
    optimizer_restoring.load(learner, reading.optimizer, manifest.state["optimizer_numbers"])
    learner.steps = manifest.step
    learner.expected_items = manifest.state["expected_items"]
    for name, value in own["extra"].items():
        with _noted(f"the extra state of {name or 'the model'}", checkpoint):
            model.get_submodule(name).set_extra_state(value)
    if own["data"]:
        with _noted("the training dataset's state", checkpoint):
            data.load_state_dict(own["data"])
    if own["job"] and hasattr(learner.job, "load_state_dict"):
        with _noted("the job's state", checkpoint):
            learner.job.load_state_dict(own["job"])
    elif own["job"]:
        notes.append("the job's state is left out: it has no load_state_dict")
    if reading.same_ranks:
        buffers = persistent_buffers(model)
        for name, value in own["buffers"].items():
            local_part(buffers[name]).copy_(local_part(value))
    optimizer_restoring.load_groups(learner, own["optimizer_groups"], manifest.state["optimizer"], notes)
    learner.model.wire.load_state_dict(reading.wire_of, manifest.world_size)
    if reading.same_ranks:  # last: the user's code above may draw
        generators.set_state(own["random"], learner.device)
    else:
        notes.append(
            f"saved on {manifest.world_size} ranks: dropout and the like draw new random numbers on "
            f"{learner.world_size}"
        )
    return notes


def _check_state(checkpoint: Checkpoint) -> None:
    manifest, state = checkpoint.manifest, checkpoint.manifest.state
    if manifest.applied_steps > manifest.step:
        reason = f"in its manifest {manifest.applied_steps} of {manifest.step} steps were applied"
        raise DamagedCheckpointError(checkpoint.path, reason)
    for name, fits in _STATE.items():
        if not fits(state.get(name)):
            found = repr(state.get(name))[:60]
            raise DamagedCheckpointError(checkpoint.path, f"in its manifest's state {name} is {found}")


def _require_same_model(checkpoint: Checkpoint, targets: dict[str, Tensor], facts: dict[str, TensorFacts]) -> None:
    saved = {name: fact for name, fact in facts.items() if name.startswith(MODEL_PREFIX)}
    missing = sorted(targets.keys() - saved.keys())
    added = sorted(saved.keys() - targets.keys())
    common = [name for name in targets if name in saved]
    other = [name for name in common if saved[name].shape != targets[name].shape]
    kinds = [name for name in common if kind(saved[name]) != kind(targets[name])]
    if not missing and not added and not other and not kinds:
        return
    lines = [f"{checkpoint.path} is not of this model:"]
    for names, words in ((missing, "it lacks"), (added, "it has, and the model has not,")):
        if names:
            lines.append(f"  {words} {listed(names)}")
    lines += [f"  {name} is {tuple(saved[name].shape)} there and {tuple(targets[name].shape)} here" for name in other]
    lines += [f"  {name} is {saved[name].dtype} there and {targets[name].dtype} here" for name in kinds]
    lines.append("Start a new run for another model (train.init_from takes weights that fit), or undo the change.")
    raise CheckpointError("\n".join(lines))


def _read_loss_scale(learner: Learner, saved: dict[str, Any], saved_dtype: str, notes: list[str]) -> None:
    scaled = isinstance(learner.loss_scale, DynamicLossScale)
    if scaled and saved:
        learner.loss_scale.load_state_dict(saved)
    elif scaled:
        notes.append(
            f"the run was {saved_dtype} and had no loss scale: it starts at {float(learner.loss_scale.scale):g}"
        )
    elif saved:
        notes.append(f"the loss scale ({saved.get('scale', math.nan):g}) is left out: nothing is scaled now")


def _read_own(learner: Learner, checkpoint: Checkpoint, rank: int) -> dict[str, Any]:
    """A rank's own file, of which every part is what a rank saves, as far as that can be told without the user."""
    own = read_private(checkpoint, rank)
    if wrong := [name for name, type_ in _PRIVATE.items() if not isinstance(own.get(name), type_)]:
        reason = f"{rank_file(rank)} does not hold what a rank saves ({', '.join(wrong)})"
        raise DamagedCheckpointError(checkpoint.path, reason)
    with looking_into(checkpoint.path, rank_file(rank)):
        learner.model.wire.check(own["wire"])
        if any(not isinstance(entries, dict) or "params" in entries for entries in own["optimizer_groups"]):
            raise ValueError("what the optimizer keeps in its parameter groups is none of its")
        if wrong := [name for part in ("buffers", "extra") for name in own[part] if not isinstance(name, str)]:
            raise ValueError(f"the name {wrong[0]!r}")
    return own


def _check_buffers(learner: Learner, saved: Mapping[str, Any]) -> None:
    buffers = {name: local_part(buffer) for name, buffer in persistent_buffers(learner.model.module).items()}
    if differing := sorted(buffers.keys() ^ saved.keys()):
        raise ValueError(f"not the model's buffers: {listed(differing)}")
    for name, buffer in buffers.items():
        require_like(saved[name], buffer, name)


@contextmanager
def _noted(what: str, checkpoint: Checkpoint) -> Iterator[None]:
    """Says at the end of a traceback what the user's code was given, and from where."""
    try:
        yield
    except Exception as error:
        error.add_note(f"This was while {what} was taken up from {checkpoint.path}.")
        raise

"""What a learner's state is: how it is taken apart for a checkpoint; ``restoring`` puts it together again.

Everything by the parameter's name, so that it fits any strategy and any number of ranks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from launcher.checkpoint.snapshot import plain, plain_dict
from launcher.checkpoint.weights import MODEL_PREFIX
from launcher.training import generators, optimizer_state
from launcher.training.batches import Data
from launcher.training.step import Learner

__all__ = ["MODEL_PREFIX", "aliases", "extra_state", "persistent_buffers", "private_state", "shared_tensors"]


def shared_tensors(learner: Learner, rank: int) -> dict[str, Tensor]:
    """What the ranks save together: weights, persistent buffers (the first rank's), optimizer state; not copied.

    Raises:
        JobError: something has no name, or is not a tensor or number.
    """
    model = learner.model.module
    tensors: dict[str, Tensor] = {MODEL_PREFIX + name: parameter for name, parameter in model.named_parameters()}
    if rank == 0:
        tensors |= {MODEL_PREFIX + name: buffer.detach() for name, buffer in persistent_buffers(model).items()}
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
    return {
        "random": generators.state(learner.device),
        "buffers": {name: buffer.detach() for name, buffer in persistent_buffers(learner.model.module).items()},
        "extra": plain(extra_state(learner.model.module), "The model's extra state"),
        "data": plain_dict(data.state_dict(), "The state_dict of the training dataset"),
        "job": plain_dict(job.state_dict(), f"{type(job).__name__}.state_dict()") if hasattr(job, "state_dict") else {},
        "wire": learner.model.wire.state_dict(),
        "optimizer_groups": optimizer_state.groups(learner),
    }


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Those that belong into a ``state_dict``, by name."""
    kept = model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def extra_state(model: nn.Module) -> dict[str, Any]:
    """What modules keep through ``get_extra_state``, by the module's name."""
    found = {name.rpartition("."): value for name, value in model.state_dict(keep_vars=True).items()}
    return {module: value for (module, _, name), value in found.items() if name == "_extra_state"}

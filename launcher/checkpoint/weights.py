"""The weights of a checkpoint as one plain dict, in a single process: for exports and for starting from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from launcher.checkpoint.folder import Checkpoint
from launcher.checkpoint.loading import rank_file, read_private, read_tensors, tensor_facts
from launcher.errors import DamagedCheckpointError

__all__ = ["MODEL_PREFIX", "load_extra_state", "load_model_weights"]

MODEL_PREFIX = "model."
"""What the names of weights and buffers begin with among a checkpoint's tensors."""


def load_model_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every parameter, whole and in FP32, and every persistent buffer, by its name in the model; on the CPU.

    Parameters that the model knows under several names come under each of them, as one and the same tensor.
    Needs no process group.

    Raises:
        DamagedCheckpointError: the content is not what T-minus writes.
        OSError: a file cannot be read.
    """
    facts = {name: fact for name, fact in tensor_facts(checkpoint).items() if name.startswith(MODEL_PREFIX)}
    weights = {name: torch.empty(fact.shape, dtype=fact.dtype) for name, fact in facts.items()}
    read_tensors(checkpoint, weights)
    named = {name.removeprefix(MODEL_PREFIX): value for name, value in weights.items()}
    return named | {alias: named[name] for alias, name in checkpoint.manifest.aliases.items() if name in named}


def load_extra_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the first rank's modules gave as ``get_extra_state``, by its name in the model's ``state_dict``.

    Raises:
        DamagedCheckpointError: the content is not what T-minus writes.
        OSError: a file cannot be read.
    """
    found = read_private(checkpoint, 0).get("extra")
    if not isinstance(found, dict) or not all(isinstance(module, str) for module in found):
        raise DamagedCheckpointError(checkpoint.path, f"{rank_file(0)} does not hold what a rank saves (extra)")
    return {f"{module}._extra_state".removeprefix("."): value for module, value in found.items()}

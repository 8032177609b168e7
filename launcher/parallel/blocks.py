"""The repeated parts of a model: what is sharded, checkpointed and compiled by itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from launcher.errors import JobError
from launcher.job import Job

__all__ = ["checked_blocks", "checked_model", "checkpoint_activations", "refuse_unshardable"]


def checked_model(model: Any, job: Job) -> nn.Module:
    """Raises JobError if ``build_model`` returned something else."""
    if not isinstance(model, nn.Module):
        raise JobError(f"{type(job).__name__}.build_model returned {type(model).__name__}, not a torch.nn.Module.")
    return model


def checked_blocks(job: Job, model: nn.Module) -> list[nn.Module]:
    """The job's blocks, each once, outermost first left out: a block inside another block is not one.

    Raises:
        JobError: a block is not a part of the model.
    """
    parts = set(model.modules())
    blocks = list(dict.fromkeys(job.blocks(model)))
    for block in blocks:
        if block not in parts or block is model:
            raise JobError(f"{type(job).__name__}.blocks: {type(block).__name__} is not a part of the model.")
    inner = {part for block in blocks for part in block.modules() if part is not block}
    return [block for block in blocks if block not in inner]


def checkpoint_activations(blocks: Sequence[nn.Module]) -> None:
    """Have each block forget its activations and compute them again in the backward pass.

    The block's own forward is replaced, so that names stay as they are and hooks stay outside.
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def refuse_unshardable(model: nn.Module, units: Sequence[nn.Module], job_name: str) -> None:
    """Raises JobError on what ``fully_shard`` would break, or refuse in words of its own.

    Args:
        model: before it is sharded.
        units: the parts that are sharded by themselves, inner ones first.
        job_name: for the message.
    """
    scalars = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise JobError(
            f"{job_name}: the parameter(s) {', '.join(scalars)} have no dimension and cannot be sharded: "
            "give them the shape (1,), or use parallel=ddp."
        )
    empty = [name for name, each in model.named_parameters() if each.requires_grad and each.numel() == 0]
    if empty:  # torch's reduction of gradients fails on them in the first backward
        raise JobError(
            f"{job_name}: the parameter(s) {', '.join(empty)} have no elements and cannot be sharded: "
            "leave them out, freeze them (requires_grad=False), or use parallel=ddp."
        )
    names = {parameter: name for name, parameter in model.named_parameters()}
    owner: dict[nn.Parameter, int] = {}
    for unit, whole in enumerate([*units, model]):
        parts = set(whole.modules())
        inner = {part for other in units if other in parts and other is not whole for part in other.modules()}
        own = [part for part in whole.modules() if part not in inner]
        for parameter in (parameter for part in own for parameter in part.parameters(recurse=False)):
            if owner.setdefault(parameter, unit) != unit:
                raise JobError(
                    f"{job_name}: the parameter {names[parameter]} is shared between two blocks, or a block and the "
                    "rest of the model, which are sharded apart: let blocks() leave those blocks out, set "
                    "parallel.wrap=model, or use parallel=ddp."
                )
    for unit in range(len(units) + 1):
        examples = {each.dtype: names[each] for each, where in owner.items() if where == unit and each.requires_grad}
        if len(examples) > 1:
            found = " and ".join(f"{name} of {str(dtype).removeprefix('torch.')}" for dtype, name in examples.items())
            raise JobError(
                f"{job_name}: {found} would be sharded together, which FSDP2 does with one type only: have blocks() "
                "name the parts of another type, build all in FP32 (precision=bf16 computes in BF16), or use "
                "parallel=ddp."
            )

"""One call for a model of anybody's."""

from __future__ import annotations

from dataclasses import fields
from enum import Enum
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from launcher.compression.replicated import attach_replicated
from launcher.compression.sharded import attach_sharded
from launcher.compression.wire import Wire
from launcher.config.nearest import nearest
from launcher.config.rules import compression_problems
from launcher.config.schema import Accumulate, Axis, Codec, CompressionConfig, Strategy
from launcher.errors import ConfigurationError

__all__ = ["attach"]


def attach(model: nn.Module, codec: str, *, scaler: Any = None, **options: Any) -> Wire:
    """Send a model's gradients through a codec from now on; call it on all ranks, before training.

    The gradients come back as the FP32 mean over the ranks, as they did before. Nothing else in the loop changes.

    Args:
        model: wrapped in DistributedDataParallel, or after ``fully_shard`` (on a mesh of one or two dimensions).
        codec: "fp16", "bf16", "int8" or "powersgd".
        scaler: a ``GradScaler`` that multiplies the loss, so that what is kept for the next step is independent of
            the scale.
        options: fields of ``launcher.config.schema.CompressionConfig``, such as ``accumulate="wire"``.
            ``error_feedback`` is on for int8 and powersgd unless it is given.

    Returns:
        The wire: bytes sent, and state for a checkpoint (``state_dict``, ``load_state_dict``).

    Raises:
        ConfigurationError: naming the value that is wrong and the valid ones.
    """
    config = _config(codec, options)
    if isinstance(model, DistributedDataParallel):
        _check(config, Strategy.ddp)
        wire = Wire(next(model.module.parameters()).device, scaler)
        attach_replicated(model, config, wire)
        return wire
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not sharded:
        raise ConfigurationError(
            f"{type(model).__name__} is neither wrapped in DistributedDataParallel nor passed through fully_shard: "
            "do that first, then attach the codec."
        )
    parameter = next(each for each in model.parameters() if isinstance(each, DTensor))
    _check(config, Strategy.hsdp if parameter.device_mesh.ndim == 2 else Strategy.fsdp)
    wire = Wire(parameter.device, scaler)
    attach_sharded(model, config, wire)
    return wire


def _config(codec: str, options: dict[str, Any]) -> CompressionConfig:
    chosen = _member(Codec, "codec", codec, without=(Codec.none,))
    valid = {field.name for field in fields(CompressionConfig)} - {"codec"}
    for name in options:
        if name not in valid:
            raise ConfigurationError(
                f"There is no option {name!r}.{nearest(name, valid)} Valid: {', '.join(sorted(valid))}."
            )
    for name, kind in (("accumulate", Accumulate), ("axis", Axis)):
        if options.get(name) is not None:
            options[name] = _member(kind, name, options[name])
    options.setdefault("error_feedback", chosen in (Codec.int8, Codec.powersgd))
    return CompressionConfig(codec=chosen, **options)


def _member(kind: type[Enum], name: str, value: Any, without: tuple[Enum, ...] = ()) -> Any:
    valid = {str(member.value): member for member in kind if member not in without}
    chosen = valid.get(value.value if isinstance(value, kind) else value)
    if chosen is None:
        raise ConfigurationError(f"{name}={value!r} is not one of {', '.join(valid)}.{nearest(str(value), valid)}")
    return chosen


def _check(config: CompressionConfig, strategy: Strategy) -> None:
    problems = list(compression_problems(config, strategy))
    if problems:
        raise ConfigurationError("\n".join(problems))

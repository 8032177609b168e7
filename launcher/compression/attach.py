"""One call for a model of anybody's."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from launcher.compression.fsdp import has_replicas, has_shards
from launcher.compression.replicated import attach_replicated
from launcher.compression.sharded import attach_sharded
from launcher.compression.wire import Wire
from launcher.config.compression_rules import compression_problems
from launcher.config.nearest import nearest
from launcher.config.schema import Codec, CompressionConfig, Strategy
from launcher.config.words import in_words
from launcher.errors import ConfigurationError

__all__ = ["attach"]

_attached: WeakSet[nn.Module] = WeakSet()
"""Models that have a codec."""


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
    _check_use(model, scaler)
    if isinstance(model, DistributedDataParallel):
        _check(config, Strategy.ddp)
        wire = Wire(next(model.module.parameters()).device, scaler)
        attach_replicated(model, config, wire)
        _attached.add(model)
        return wire
    sharded: list[nn.Module] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not sharded:
        raise ConfigurationError(
            f"{type(model).__name__} is neither wrapped in DistributedDataParallel nor passed through fully_shard: "
            "do that first, then attach the codec."
        )
    if not has_shards(model):
        raise ConfigurationError(
            f"{type(model).__name__} is replicated by FSDP2's replicate(): wrap it in DistributedDataParallel instead, "
            "or use fully_shard on a mesh of (replicas, 1)."
        )
    parameter = next((each for each in model.parameters() if isinstance(each, DTensor)), None)
    if parameter is None:
        raise ConfigurationError(f"{type(model).__name__} has no parameter in shards: there is nothing to reduce.")
    _check(config, Strategy.hsdp if has_replicas(model) else Strategy.fsdp)
    wire = Wire(parameter.device, scaler)
    attach_sharded(model, config, wire)
    _attached.update(sharded)
    return wire


def _config(codec: str, options: dict[str, Any]) -> CompressionConfig:
    """The options as a configuration file would give them: the same types, the same words."""
    valid = [str(member.value) for member in Codec if member is not Codec.none]
    name = codec.value if isinstance(codec, Codec) else codec
    if name not in valid:
        raise ConfigurationError(f"codec={codec!r} is not one of {', '.join(valid)}.{nearest(str(name), valid)}")
    options = {"error_feedback": name in (Codec.int8.value, Codec.powersgd.value), **options}
    try:
        config = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(CompressionConfig(codec=Codec(name))), options)
        )
    except OmegaConfBaseException as error:
        raise ConfigurationError(in_words(error)) from None
    assert isinstance(config, CompressionConfig)
    return config


def _check_use(model: nn.Module, scaler: Any) -> None:
    for module in model.modules():
        if module in _attached:
            raise ConfigurationError(f"This {type(module).__name__} has a codec already: attach one, once.")
    if scaler is not None and not callable(getattr(scaler, "get_scale", None)):
        raise ConfigurationError(
            f"scaler={scaler!r} has no get_scale(): pass the GradScaler that multiplies the loss, or nothing."
        )


def _check(config: CompressionConfig, strategy: Strategy) -> None:
    problems = list(compression_problems(config, strategy))
    if problems:
        raise ConfigurationError("\n".join(problems))

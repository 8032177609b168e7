"""Shards by torch's ``fully_shard``: FP32 master weights, gradients and, through them, optimizer state.

Autocast stays on: it decides operation by operation, so that norms, softmax and losses stay FP32, and its
casts of weights that are 16-bit already cost nothing. Inputs are not cast at block borders, or the
residual stream would lose its precision there.

Batch normalisation keeps its weights in FP32: torch wants them and the running statistics in one type, and
the statistics are buffers, which stay FP32. So each such layer is sharded by itself, with a policy of its own,
as FSDP1 did.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm

from launcher.compression import OverflowProbe, Wire, attach_sharded
from launcher.config.schema import Strategy
from launcher.parallel.blocks import refuse_unshardable
from launcher.parallel.deferred import DeferredModel, NotDeferrableError, build_deferred

if TYPE_CHECKING:
    from launcher.parallel.parallelize import Layout

__all__ = ["build_sharded"]

_log = logging.getLogger(__name__)


def build_sharded(
    build: Callable[[], nn.Module],
    prepare: Callable[[nn.Module], list[nn.Module]],
    strategy: Strategy,
    layout: Layout,
    watchers: tuple[Wire, OverflowProbe | None],
) -> nn.Module:
    """Build, shard and fill a model.

    Args:
        build: makes the model.
        prepare: called on the model before it is sharded; returns the blocks to shard by themselves.
        strategy: zero2, fsdp or hsdp.
        layout: of the ranks.
        watchers: what its gradients cross, and what looks at them before.
    """
    generator = torch.get_rng_state()
    deferred: DeferredModel | None = None
    try:
        deferred = build_deferred(build)
        model = deferred.module
    except NotDeferrableError as error:
        torch.set_rng_state(generator)
        _log.warning("The model's initialisation cannot be deferred (%s): every rank builds it in full.", error)
        model = build()
    torch.set_rng_state(generator)
    blocks = prepare(model)
    units = [*_full_precision(model, blocks, layout.dtype), *blocks]
    refuse_unshardable(model, units, type(model).__name__)
    _shard(model, units, strategy, layout)
    if deferred is None:
        model.to(layout.device)
    else:
        model.to_empty(device=layout.device)
        _fill(model, deferred)
    wire, probe = watchers
    attach_sharded(model, layout.compression, wire, probe)
    return model.train()


def _full_precision(model: nn.Module, blocks: list[nn.Module], dtype: torch.dtype) -> list[nn.Module]:
    """The layers inside ``model`` and its blocks whose weights stay FP32 while the others' are in ``dtype``."""
    if dtype is torch.float32:
        return []
    units = {model, *blocks}
    norms = (part for part in model.modules() if isinstance(part, _BatchNorm) and part not in units)
    return [norm for norm in norms if next(norm.parameters(), None) is not None]


def _shard(model: nn.Module, units: list[nn.Module], strategy: Strategy, layout: Layout) -> None:
    """``units``: inner ones first."""
    half = layout.dtype if layout.dtype is not torch.float32 else None
    mesh = _mesh(strategy, layout)
    for part in [*units, model]:
        # Gradients are reduced, and accumulated between micro-batches, in reduce_dtype.
        policy = MixedPrecisionPolicy(
            param_dtype=None if isinstance(part, _BatchNorm) else half,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        # Backward begins with the outermost weights: to free them after forward is to gather them again at once.
        reshard = strategy is not Strategy.zero2 and part is not model
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)


def _mesh(strategy: Strategy, layout: Layout) -> DeviceMesh:
    if strategy is not Strategy.hsdp:
        return init_device_mesh(layout.device.type, (layout.world_size,), mesh_dim_names=("shard",))
    shape = (layout.world_size // layout.shard_size, layout.shard_size)
    return init_device_mesh(layout.device.type, shape, mesh_dim_names=("replicate", "shard"))


@torch.no_grad()
def _fill(model: nn.Module, deferred: DeferredModel) -> None:
    """Give every parameter its shard of the initial value, every buffer its value."""
    places: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, initial in deferred.replay():
        place = places.pop(name)
        value = initial.to(place.device)
        if isinstance(place, DTensor):
            # No communication: every rank has the same value and takes its part.
            place.copy_(distribute_tensor(value, place.device_mesh, place.placements, src_data_rank=None))
        else:
            place.copy_(value)
    assert not places, f"not initialised: {sorted(places)}"

"""Into FSDP2: a reduce-scatter of ours for each module, and for hsdp a mean over the replicas.

FSDP2 waits for a reduce-scatter before it goes on (on CUDA: a stream of its own does), so chunks run here and now.
"""

from __future__ import annotations

from itertools import count
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import DDPMeshInfo

from launcher.compression.channel import Channel
from launcher.compression.fsdp import (
    full_name,
    leave_replicas_alone,
    parameter_groups,
    refuse_several_meshes,
    rows_of,
    tell_present,
    trainers_of,
)
from launcher.compression.layout import Layout, refuse_complex
from launcher.compression.links import Team, reduce_scatter
from launcher.compression.powersgd import PowerSGD
from launcher.compression.probe import OverflowProbe
from launcher.compression.wire import Wire
from launcher.config.schema import Axis, Codec, CompressionConfig

__all__ = ["attach_sharded"]


def attach_sharded(model: nn.Module, config: CompressionConfig, wire: Wire, probe: OverflowProbe | None = None) -> None:
    """Take over the reductions of every FSDP2 module in ``model``; all ranks call this.

    Args:
        model: after ``fully_shard``.
        config: of the codec.
        wire: counts, and keeps errors.
        probe: looks at what goes into the reduce-scatters.
    """
    refuse_several_meshes(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    wire.trainers = trainers_of(model)
    if config.codec is not Codec.none:
        refuse_complex(names)
    routes = _Routes(config, wire)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in parameter_groups(module):
                unit = _Unit(group, names, routes, probe)
                module.set_custom_reduce_scatter(unit)  # type: ignore[arg-type]  # by duck typing
                if unit.takes_replicas:
                    leave_replicas_alone(group)
                    module.set_all_reduce_hook(unit.reduce_replicas)
                elif unit.has_shards_of_one:
                    module.set_all_reduce_hook(unit.count_replicas)


class _Way(Protocol):
    """Replaces a shard by the mean over the replicas."""

    def prepare(self, key: int, layout: Layout) -> None:
        """Make the memory of the errors now, so that a checkpoint finds its place."""

    def run(self, key: int, flat: Tensor, parts: list[Tensor], layout: Layout) -> None:
        """``flat``, also as ``parts`` in the shape of the parameters' shards."""

    def stay(self, key: int, names: frozenset[str]) -> None:
        """These parameters' means are nobody's: their errors stay what they were."""


class _Routes:
    """The channels, one for each group of ranks."""

    def __init__(self, config: CompressionConfig, wire: Wire) -> None:
        self.config = config
        self.wire = wire
        self.numbers = count()
        self._shard: dict[dist.ProcessGroup, Channel] = {}
        self._replica: dict[dist.ProcessGroup, _Way] = {}

    def shard_channel(self, info: Any) -> Channel | None:
        """What averages over the ranks that share a copy; None: torch does."""
        codec, is_hsdp = self.config.codec, isinstance(info, DDPMeshInfo)
        whole = self.config.axis is Axis.all or (self.config.axis is None and not is_hsdp)
        group = info.shard_process_group
        if not whole or codec in (Codec.none, Codec.powersgd) or group.size() == 1:
            return None
        if group not in self._shard:
            replicas = info.replicate_mesh_size if is_hsdp else 1
            team = Team(group, self.wire.device)
            self._shard[group] = Channel(team, self.config, self.wire, "shard", 1.0 / replicas, scatters=True)
        return self._shard[group]

    def replica_way(self, info: Any) -> _Way | None:
        """What averages over the copies; None: torch does, or there is one."""
        if not isinstance(info, DDPMeshInfo) or self.config.codec is Codec.none or info.replicate_mesh_size == 1:
            return None
        group = info.replicate_process_group
        if group not in self._replica:
            team = Team(group, self.wire.device)
            if self.config.codec is Codec.powersgd:
                self._replica[group] = PowerSGD(team, self.config, self.wire, "replica")
            else:
                self._replica[group] = _ChannelWay(Channel(team, self.config, self.wire, "replica"))
        return self._replica[group]


class _ChannelWay:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def prepare(self, key: int, layout: Layout) -> None:
        self._channel.prepare(key, layout, gathers=True)

    def run(self, key: int, flat: Tensor, parts: list[Tensor], layout: Layout) -> None:
        self._channel.run_mean(key, flat, layout)

    def stay(self, key: int, names: frozenset[str]) -> None:
        self._channel.stay(key, names)


def _shards_in(flat: Tensor, parameters: tuple[Any, ...]) -> dict[Any, Tensor]:
    """Views of this rank's padded shard of each parameter, empty ones included."""
    sizes = [each.padded_sharded_param_size for each in parameters]
    parts = torch.split(flat, [size.numel() for size in sizes])
    return {each: part.view(size) for each, part, size in zip(parameters, parts, sizes, strict=True)}


class _Layouts(NamedTuple):
    """Of the same parameters."""

    whole: Layout
    """Of all shards."""
    shard: Layout
    """Of this rank's."""


class _Unit:
    """The parameters of one FSDP2 module, whose gradients cross the wire in one flat tensor.

    Serves as ``torch.distributed.fsdp``'s ReduceScatter. A parameter without a gradient is missing in the tensor, and
    the call does not say which is there: that is looked up where FSDP2 is about to collect them.
    """

    def __init__(self, group: Any, names: dict[Any, str], routes: _Routes, probe: OverflowProbe | None) -> None:
        info = group.mesh_info
        self._parameters = group.fsdp_params
        self._names = names
        self._probe = probe
        self._wire = routes.wire
        self.key = next(routes.numbers)
        self._num_shards: int = info.shard_mesh_size
        self._shard_rank: int = info.shard_mesh_rank
        self._channel = routes.shard_channel(info)
        self._replica = routes.replica_way(info)
        self._natively_replicated = info.replicate_mesh_size if isinstance(info, DDPMeshInfo) else 1
        self.takes_replicas = self._replica is not None
        self.has_shards_of_one = self._num_shards == 1
        """Then FSDP2 has no reduce-scatter to call."""
        self.bytes_sent = 0
        self._present: tuple[Any, ...] = ()
        """Parameters that have a gradient."""
        self._whole = torch.empty(0)
        self._layouts: dict[tuple[Any, ...], _Layouts] = {}
        self._wire.counters.append(self)
        if self.trainable and self._channel is not None:
            self._channel.prepare(self.key, self.layouts(self.trainable).whole, gathers=False)
        if self.trainable and self._replica is not None:
            self._replica.prepare(self.key, self.layouts(self.trainable).shard)
        tell_present(group, self._find)

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """FSDP2's own buffers."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        """The reduce-scatter."""
        if self._probe is not None:
            self._probe.look(input_tensor)
        if self._channel is None:
            self.bytes_sent += (self._num_shards - 1) * output_tensor.nbytes
            if not self.takes_replicas:
                self.count_replicas(output_tensor)
            return reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        if op not in (dist.ReduceOp.AVG, dist.ReduceOp.SUM):
            raise ValueError(
                "A gradient divide factor (set_gradient_divide_factor) cannot go with a codec: it always averages."
            )
        self._wire.crossing(self.key)
        source, target = input_tensor, output_tensor
        if source.dtype is not torch.float32:
            source, target = source.float(), torch.empty_like(target, dtype=torch.float32)
        layout = self.layouts(self._present).whole
        self._channel.run_shard_mean(self.key, source, target, layout if layout.numel == source.numel() else None)
        if op == dist.ReduceOp.SUM:
            target.mul_(self._num_shards)
        if target is not output_tensor:
            output_tensor.copy_(target)
        if not self.takes_replicas:
            self._wire.crossed(output_tensor)
        return None

    def count_replicas(self, shard: Tensor) -> None:
        """What FSDP2's own sum over the replicas sends, if there are any."""
        self.bytes_sent += 2 * (self._natively_replicated - 1) * shard.nbytes // self._natively_replicated

    def reduce_replicas(self, shard: Tensor) -> None:
        """The mean of the shard that each replica holds, in place."""
        assert self._replica is not None
        self._wire.crossing((self.key, "replica"))
        values = shard if shard.dtype is torch.float32 else shard.float()
        if self._present == self.trainable:
            parts = list(_shards_in(values, self._present).values())
            self._replica.run(self.key, values, parts, self.layouts(self._present).shard)
        else:
            self._reduce_with_zeros(self._replica, values)
        if values is not shard:
            shard.copy_(values)

    def _reduce_with_zeros(self, way: _Way, values: Tensor) -> None:
        """Parameters without a gradient go along as zeros: who owns which part is the same in every step."""
        layout = self.layouts(self.trainable).shard
        if self._whole.numel() != layout.numel:
            self._whole = values.new_empty(layout.numel)
        self._whole.zero_()
        here, parts = _shards_in(values, self._present), _shards_in(self._whole, self.trainable)
        for parameter, part in here.items():
            parts[parameter].copy_(part)
        way.run(self.key, self._whole, list(parts.values()), layout)
        for parameter, part in here.items():
            part.copy_(parts[parameter])
        way.stay(self.key, layout.names - self.layouts(self._present).shard.names)

    @property
    def trainable(self) -> tuple[Any, ...]:
        """Parameters that may have a gradient."""
        return tuple(each for each in self._parameters if each.sharded_param.requires_grad)

    def _find(self, present: tuple[Any, ...]) -> None:
        self._present = present

    def layouts(self, parameters: tuple[Any, ...]) -> _Layouts:
        """Of a flat tensor with these parameters."""
        if parameters not in self._layouts:
            count, names = self._num_shards, self._names
            shapes = [
                (full_name(each, names.get(each.sharded_param, "?"), count), rows_of(each, count))
                for each in parameters
            ]
            whole = Layout.of_shards(shapes, count)
            self._layouts[parameters] = _Layouts(whole, whole.part(self._shard_rank, count))
        return self._layouts[parameters]

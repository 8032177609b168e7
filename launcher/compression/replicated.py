"""Into DistributedDataParallel: a communication hook.

torch's ``none`` is the backend's sum of FP32. With a codec a bucket goes to the courier, which averages it while
backward goes on.
"""

# DDP looks at the annotations of a hook, which must be types: no postponed annotations in this file.

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from launcher.compression.channel import Channel
from launcher.compression.courier import Courier, Errand, build_courier
from launcher.compression.ddp import Usage, settle_buckets
from launcher.compression.layout import Layout, refuse_complex
from launcher.compression.links import Team
from launcher.compression.powersgd import PowerSGD
from launcher.compression.probe import OverflowProbe
from launcher.compression.trainers import Trainers
from launcher.compression.wire import Wire
from launcher.config.schema import Codec, CompressionConfig
from launcher.errors import ConfigurationError, JobError

__all__ = ["attach_replicated", "preferred_bucket_mib"]

_Future: Any = torch.futures.Future
_Way = Callable[["_Bucket"], Any]
_ENCODED_BUCKET_MIB = 8.0


class _Bucket:
    """One of DDP's buckets; all that is needed of it after the hook has returned."""

    def __init__(self, bucket: dist.GradBucket, names: dict[Tensor, str]) -> None:  # type: ignore[name-defined]
        self.index = bucket.index()
        self.flat = bucket.buffer()
        self.gradients = bucket.gradients()
        self.layout = Layout.of_bucket([(names[each], each.numel()) for each in bucket.parameters()])


class _Hook:
    """The state of DDP's hook."""

    def __init__(self, names: dict[Tensor, str], wire: Wire, probe: OverflowProbe | None) -> None:
        self.names = names
        self.wire = wire
        self.probe = probe
        self.prepare: Callable[[_Bucket], None] = lambda bucket: None
        """Called once for each of DDP's final buckets, before anything crosses."""
        self.send: _Way = _arrived
        self.stay: Callable[[int, frozenset[str]], None] = lambda index, names: None
        """Called with parameters whose mean DDP drops: their errors stay what they were."""
        self.layouts: dict[int, Layout] = {}
        """Of all buckets that have crossed."""
        self.is_idle = False
        """Whether buckets have nothing in them, and go nowhere."""


def _cross(hook: _Hook, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    crossing = _Bucket(bucket, hook.names)
    future: torch.futures.Future[Tensor]
    if hook.is_idle:
        future = _arrived(crossing)
        return future
    if hook.probe is not None:
        hook.probe.look(crossing.flat)
    hook.wire.crossing(crossing.index)
    if crossing.flat.numel():
        hook.layouts[crossing.index] = crossing.layout
    future = hook.send(crossing)
    return future


def _spare(hook: _Hook, parameters: Iterable[nn.Parameter]) -> None:
    """DDP drops their means: what was kept for them is not sent."""
    names = {hook.names[parameter] for parameter in parameters}
    for index, layout in hook.layouts.items() if names else ():
        hook.stay(index, layout.names & names)


def _arrived(bucket: _Bucket) -> Any:
    future = _Future()
    future.set_result(bucket.flat)
    return future


def attach_replicated(
    model: DistributedDataParallel,
    config: CompressionConfig,
    wire: Wire,
    probe: OverflowProbe | None = None,
) -> None:
    """Register the hook. With ``codec=none`` buckets come back as sums, otherwise as means.

    Args:
        model: with no hook yet; all its ranks call this.
        config: of the codec.
        wire: counts, and keeps errors.
        probe: looks at the buckets on their way.
    """
    names = {parameter: name for name, parameter in model.module.named_parameters()}
    hook = _Hook(names, wire, probe)
    if model._comm_hooks:
        raise ConfigurationError(
            "This DistributedDataParallel has a communication hook already, and can have one: leave out "
            "register_comm_hook, or the codec."
        )
    wire.trainers = Trainers.of_group(model.process_group)
    if model.process_group.size() > 1:
        _choose(hook, config, model, wire)
    model.register_comm_hook(hook, _cross)
    hook.is_idle = True
    settle_buckets(model)
    hook.is_idle = False
    if wire.keeps_errors:
        usage = Usage(model)
        wire.before_settling.append(lambda: _spare(hook, usage.unused()))
        for bucket in model.reducer._get_zeros_like_grad_buckets():
            hook.prepare(_Bucket(bucket, names))


def preferred_bucket_mib(codec: Codec, device: torch.device) -> float | None:
    """DDP's ``bucket_cap_mb`` that suits a codec; None: torch's default.

    What an encoder has sent is gone long before backward has filled torch's second bucket, of 25 MiB.
    """
    encodes = codec in (Codec.fp16, Codec.bf16, Codec.int8)
    return _ENCODED_BUCKET_MIB if encodes and device.type == "cpu" else None


def _choose(hook: _Hook, config: CompressionConfig, model: DistributedDataParallel, wire: Wire) -> None:
    group = model.process_group
    if config.codec is Codec.none:
        hook.send = _Summing(group, wire).send
        return
    refuse_complex(hook.names)
    _refuse_sparse(model.module)
    team = Team(group, wire.device)
    if config.codec is Codec.powersgd:
        factors = PowerSGD(team, config, wire, axis="replica")
        hook.prepare = lambda bucket: factors.prepare(bucket.index, bucket.layout)
        hook.send = _Approximating(factors).send
        hook.stay = factors.stay
        return
    channel = Channel(team, config, wire, axis="replica")
    hook.prepare = lambda bucket: channel.prepare(bucket.index, bucket.layout, gathers=True)
    hook.send = _Averaging(channel).send
    hook.stay = channel.stay


def _refuse_sparse(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if getattr(module, "sparse", False):
            raise JobError(
                f"The gradient of {name or 'the model'} ({type(module).__name__}) is sparse, which no codec can "
                "encode: use sparse=False, or compression=none."
            )


class _Summing:
    """The backend's sum in FP32: a division would be another pass."""

    def __init__(self, group: dist.ProcessGroup, wire: Wire) -> None:
        self._group = group
        self.bytes_sent = 0
        wire.counters.append(self)

    def send(self, bucket: _Bucket) -> Any:
        self.bytes_sent += 2 * (self._group.size() - 1) * bucket.flat.nbytes // self._group.size()
        work = dist.all_reduce(bucket.flat, group=self._group, async_op=True)
        assert work is not None
        return work.get_future().then(lambda future: future.value()[0])


class _Copies:
    """FP32 copies of buckets of another type, the same ones in every step."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def of(self, bucket: _Bucket) -> Tensor:
        """A bucket's values in FP32: its own, or a copy."""
        flat: Tensor = bucket.flat
        if flat.dtype is torch.float32:
            return flat
        kept = self._kept.get(bucket.index)
        if kept is None or kept.numel() != flat.numel():
            kept = self._kept[bucket.index] = torch.empty_like(flat, dtype=torch.float32)
        kept.copy_(flat)
        return kept


class _Approximating:
    """PowerSGD's mean; torch's hook multiplies in FP32 alone."""

    def __init__(self, factors: PowerSGD) -> None:
        self._factors = factors
        self._copies = _Copies()

    def send(self, bucket: _Bucket) -> Any:
        flat, values = bucket.flat, self._copies.of(bucket)
        if values is flat:
            return self._factors.submit(bucket.index, flat, bucket.gradients, bucket.layout)
        sizes = [each.numel() for each in bucket.gradients]
        parts = [part.view_as(each) for part, each in zip(torch.split(values, sizes), bucket.gradients, strict=True)]
        future = self._factors.submit(bucket.index, values, parts, bucket.layout)
        return future.then(lambda mean: flat.copy_(mean.value()))


class _Averaging:
    """A codec's mean, while backward goes on."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._courier: Courier = build_courier(lambda: channel.pipeline, channel.team.device)
        self._copies = _Copies()

    def send(self, bucket: _Bucket) -> Any:
        flat = bucket.flat
        if not flat.numel():  # of empty parameters alone
            return _arrived(bucket)
        values = self._copies.of(bucket)

        def finish() -> None:
            if values is not flat:
                flat.copy_(values)

        chunks = tuple(self._channel.mean(bucket.index, values, bucket.layout))
        return self._courier.take(Errand(chunks, flat, finish))

"""Models whose gradients are whatever a test says, on DDP and FSDP2, and what their mean may be off by."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from launcher.compression import Wire, channel, links
from launcher.compression.exchange import Sizes

__all__ = [
    "Given",
    "backward",
    "bound",
    "digest",
    "drawn",
    "exact_mean",
    "gradients",
    "hosts",
    "replicated",
    "sharded",
    "small_sizes",
    "told",
]

Shapes = Sequence[tuple[int, ...]]
_LOST = {"fp16": 2.0**-11, "bf16": 2.0**-8, "int8": 1 / 254}
_SMALLEST = 2.0**-25
"""Half of the smallest step of FP16."""


class Given(nn.Module):
    """The gradient of each parameter is what is passed in for it; None: it is not used."""

    def __init__(self, shapes: Shapes, frozen: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes)
        for index in frozen:
            self.parts[index].requires_grad_(False)

    def forward(self, given: Sequence[Tensor | None]) -> Tensor:
        products = [(part * each).sum() for part, each in zip(self.parts, given, strict=True) if each is not None]
        return torch.stack(products).sum()


def replicated(model: Given, bucket_mib: float = 25.0, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model, bucket_cap_mb=bucket_mib, gradient_as_bucket_view=True, **options)


def sharded(model: Given, mesh: tuple[int, ...], reshard: bool = True) -> Given:
    """Over one dimension, or replicas × shards."""
    names = ("replicate", "shard")[-len(mesh) :]
    fully_shard(model, mesh=init_device_mesh("cpu", mesh, mesh_dim_names=names), reshard_after_forward=reshard)
    return model


def drawn(rank: int, step: int, shapes: Shapes) -> list[Tensor]:
    """A rank's gradients in a step."""
    generator = torch.Generator().manual_seed(10_000 * step + 100 * rank + 7)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def exact_mean(world_size: int, step: int, shapes: Shapes) -> list[Tensor]:
    """Of what ``drawn`` gives all ranks, in float64."""
    ranks = [drawn(rank, step, shapes) for rank in range(world_size)]
    return [sum(each.double() for each in parts) / world_size for parts in zip(*ranks, strict=True)]  # type: ignore[misc]


def bound(name: str, world_size: int, ranks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """What the mean of ``ranks``' gradients may be off by, for each element, one scatter and one gather later.

    Each rank's part is rounded once and the mean once more, by a share of the value (16 bits) or of the largest in
    its block (int8; here: of all). A backend that sums in 16 bits rounds once for each rank. FP32 does the rest.
    """
    codec, _, way = name.partition(" ")
    magnitudes = [sum(each.double().abs() for each in parts) / world_size for parts in zip(*ranks, strict=True)]
    if codec == "int8":
        largest = sum(max(each.abs().max().item() for each in rank if each.numel()) for rank in ranks) / world_size
        magnitudes = [torch.full_like(each, largest) for each in magnitudes]  # type: ignore[arg-type]
    roundings = world_size + 1 if way == "wire" else 2
    relative = roundings * _LOST.get(codec, 0.0) * 1.01 + world_size * 2.0**-23
    return [magnitude * relative + roundings * _SMALLEST for magnitude in magnitudes]


def backward(model: nn.Module, given: Sequence[Tensor | None], scale: float = 1.0) -> None:
    (model(given) * scale).backward()


def gradients(model: nn.Module) -> list[Tensor | None]:
    """Whole ones; collective where they are sharded."""
    found = [part.grad for part in _given(model).parts]
    return [each.full_tensor() if isinstance(each, DTensor) else each for each in found]


def _given(model: nn.Module) -> Given:
    given = model.module if isinstance(model, DistributedDataParallel) else model
    assert isinstance(given, Given)
    return given


def digest(values: Sequence[Tensor | None]) -> str:
    """The same for the same bits."""
    text = hashlib.sha256()
    for value in values:
        text.update(b"none" if value is None else value.detach().float().contiguous().numpy().tobytes())
    return text.hexdigest()


@contextmanager
def told(wire: Wire, found_inf: float = 0.0, scale: float = 1.0, measures: bool = False) -> Iterator[None]:
    """A step of a loop that tells the wire, as the launcher's does."""
    wire.begin(torch.tensor(scale), measures=measures)
    yield
    wire.conclude(torch.tensor(found_inf))


@contextmanager
def small_sizes() -> Iterator[None]:
    """Tensors are cut into many chunks of several portions, more than there are slots."""
    sizes = Sizes(message_bytes=1 << 10, portion=1 << 8, num_slots=3, sum_bytes=1 << 10)
    with mock.patch.dict(channel._SIZES, {"cpu": sizes}):
        yield


@contextmanager
def hosts(rank: int, ranks_per_host: int | None) -> Iterator[None]:
    """As if neighbours in rank shared a host; None: as it is."""
    if ranks_per_host is None:
        yield
        return
    key: Callable[[], str] = lambda: f"host {rank // ranks_per_host}"  # noqa: E731
    with mock.patch.object(links, "host_key", key):
        yield

"""Where a parameter's elements lie in the flat tensors that cross the wire.

State that belongs to a flat tensor (error feedback) is saved by parameter name, so that it finds its place in
other buckets, under another strategy, and on another number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from launcher.errors import JobError

__all__ = ["Layout", "Slice", "parse_key", "refuse_complex", "slice_key"]


@dataclass(frozen=True)
class Slice:
    """Elements ``start`` to ``start + length`` of a flattened parameter, at ``offset`` of a flat tensor."""

    offset: int
    name: str
    start: int
    length: int


@dataclass(frozen=True)
class Layout:
    """The slices of one flat tensor of ``numel`` elements; what no slice covers is padding."""

    slices: tuple[Slice, ...]
    numel: int

    @cached_property
    def names(self) -> frozenset[str]:
        """Of the parameters."""
        return frozenset(part.name for part in self.slices)

    @classmethod
    def of_bucket(cls, parameters: Sequence[tuple[str, int]]) -> Layout:
        """Whole parameters, given as (name, number of elements), one after the other."""
        slices, offset = [], 0
        for name, numel in parameters:
            slices.append(Slice(offset, name, 0, numel))
            offset += numel
        return cls(tuple(slices), offset)

    @classmethod
    def of_shards(cls, parameters: Sequence[tuple[str, torch.Size]], num_shards: int) -> Layout:
        """FSDP2's: for each shard in turn, its rows of each parameter; short shards padded to the first one's rows."""
        slices, offset = [], 0
        for shard in range(num_shards):
            for name, shape in parameters:
                rows, row = (shape[0], shape[1:].numel()) if len(shape) else (1, 1)
                each = -(-rows // num_shards)
                first, last = min(shard * each, rows), min((shard + 1) * each, rows)
                slices.append(Slice(offset, name, first * row, (last - first) * row))
                offset += each * row
        return cls(tuple(slices), offset)

    def within(self, offset: int, length: int) -> Iterator[Slice]:
        """The slices of ``[offset, offset + length)``, their offsets counted from its beginning."""
        for part in self.slices:
            first = max(part.offset, offset)
            last = min(part.offset + part.length, offset + length)
            if first < last:
                yield Slice(first - offset, part.name, part.start + first - part.offset, last - first)

    def part(self, index: int, num_parts: int) -> Layout:
        """One of ``num_parts`` equal parts."""
        each = self.numel // num_parts
        return Layout(tuple(self.within(index * each, each)), each)


def slice_key(kind: str, part: Slice) -> str:
    """The name under which a slice's values are saved."""
    return f"{kind}/{part.name}/{part.start}"


def parse_key(key: str) -> tuple[str, str, int]:
    """The kind, the parameter's name and the first element of a saved slice; −1 for what is not one."""
    kind, _, rest = key.partition("/")
    name, _, start = rest.rpartition("/")
    return kind, name, int(start) if start.isdecimal() else -1


def refuse_complex(names: Mapping[Any, str]) -> None:
    """Raises JobError if a parameter is complex: encoders see real numbers, and would drop the rest.

    Args:
        names: by parameter.
    """
    found = [name for parameter, name in names.items() if parameter.is_complex() and parameter.requires_grad]
    if found:
        raise JobError(
            f"The parameter {found[0]} is complex, which no codec can encode: use compression=none, or keep its real "
            "and imaginary part as real parameters (torch.view_as_real)."
        )

"""One rank's part of a checkpoint, on its way to the disk; needs no other rank.

Tensors are written in DCP's format, which plain ``torch.distributed.checkpoint`` reads too; what belongs to one
rank alone goes to a file of its own; a report tells rank 0 what was written where.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter, _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.utils.serialization import config as serialization

from launcher.checkpoint.files import writing
from launcher.checkpoint.loading import rank_file
from launcher.checkpoint.manifest import FileRecord

__all__ = ["collect_parts", "write_part"]


class _DigestingFiles(FileSystem):
    """Files that are digested while they are written."""

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """Only for writing."""
        assert mode == "wb"
        with writing(Path(path), self.records) as stream:
            yield _OpenUntilExit(stream)


class _OpenUntilExit:
    """A stream that torch may close before its digest is taken."""

    def __init__(self, stream: Any) -> None:
        self.write, self.tell, self.flush = stream.write, stream.tell, stream.flush

    def close(self) -> None:
        """Nothing yet."""


class _Writer(FileSystemWriter):
    """torch's writer with digests. Syncing is left to the stream, which names the file if that fails."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync_files=False)
        self.fs = _DigestingFiles()

    @property
    def records(self) -> dict[str, FileRecord]:
        return cast("_DigestingFiles", self.fs).records

    def storage_meta(self) -> None:
        """None: the folder is renamed after this."""


class _Given(SavePlanner):
    """Hands out tensors by name."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def resolve_data(self, write_item: Any) -> Tensor:
        return self._tensors[write_item.index.fqn]

    def set_up_planner(self, *_: Any, **__: Any) -> None: ...
    def create_local_plan(self) -> SavePlan:
        raise NotImplementedError

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        raise NotImplementedError

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        raise NotImplementedError


def write_part(folder: Path, rank: int, plan: SavePlan, tensors: dict[str, Tensor], private: dict[str, Any]) -> None:
    """Write, sync and report what one rank has to.

    Args:
        folder: that of the checkpoint while it is written.
        rank: this rank.
        plan: which tensors this rank writes.
        tensors: them, by name: this rank's shards as plain tensors.
        private: what belongs to this rank alone: tensors and plain values.

    Raises:
        WriteFailedError: naming the file.
    """
    writer = _Writer(folder)
    plan = SavePlan(plan.items, storage_data=_StoragePrefix(f"__{rank}_"))
    # The zip archives' own checksums would be computed beside the digests.
    with serialization.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
        results = writer.write_data(plan, _Given(tensors)).wait() if plan.items else []
        records = dict(writer.records)
        with writing(folder / rank_file(rank), records) as stream:
            torch.save(private, stream)
    report = {
        "files": {name: [record.size, record.sha256] for name, record in records.items()},
        "places": [_place_as_json(result) for result in results],
    }
    with writing(folder / _report(rank), {}) as stream:
        stream.write(json.dumps(report).encode())


def collect_parts(folder: Path, world_size: int, metadata: Metadata) -> dict[str, FileRecord]:
    """Once all ranks have written: put DCP's metadata together; returns what each file must be.

    Args:
        folder: that of the checkpoint while it is written.
        world_size: how many ranks have written.
        metadata: of the plan of all ranks.

    Raises:
        WriteFailedError, OSError: the metadata cannot be written, or a report not read.
    """
    records: dict[str, FileRecord] = {}
    results: list[list[WriteResult]] = []
    for rank in range(world_size):
        report = json.loads((folder / _report(rank)).read_bytes())
        records |= {name: FileRecord(*values) for name, values in report["files"].items()}
        results.append([_place_from_json(place) for place in report["places"]])
    writer = _Writer(folder)
    writer.finish(metadata, results)
    (temporary,) = writer.records  # written beside, then renamed
    records[temporary.removesuffix(".tmp")] = writer.records[temporary]
    for rank in range(world_size):
        (folder / _report(rank)).unlink()
    return records


def _report(rank: int) -> str:
    return f"report-{rank}.json"


def _place_as_json(result: WriteResult) -> list[Any]:
    index, info = result.index, result.storage_data
    return [index.fqn, list(index.offset or ()), index.index, info.relative_path, info.offset, info.length]


def _place_from_json(place: list[Any]) -> WriteResult:
    name, offsets, hint, file, offset, length = place
    return WriteResult(MetadataIndex(name, offsets, hint), length, _StorageInfo(file, offset, length))

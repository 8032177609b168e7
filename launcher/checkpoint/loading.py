"""Reading a checkpoint whose bytes have been verified: any rank reads what it needs, with no collective.

Nothing is unpickled outside of an allow-list: tensors and the ranks' own files by torch's ``weights_only``, DCP's
metadata by ``layout``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from launcher.checkpoint.folder import Checkpoint
from launcher.checkpoint.layout import LAYOUT, read_layout
from launcher.checkpoint.manifest import DamagedError
from launcher.errors import CheckpointError, DamagedCheckpointError

__all__ = ["TensorFacts", "rank_file", "read_private", "read_tensors", "tensor_facts"]


@dataclass(frozen=True)
class TensorFacts:
    """A saved tensor, whole."""

    shape: torch.Size
    dtype: torch.dtype


class _Reader(FileSystemReader):
    """torch's reader, with a layout that has been checked."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.path)
        self._checkpoint = checkpoint

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return _layout(self._checkpoint)


def _layout(checkpoint: Checkpoint) -> Metadata:
    try:
        sizes = {name: record.size for name, record in checkpoint.manifest.files.items()}
        if LAYOUT not in sizes:
            raise DamagedError(f"{LAYOUT} is missing")
        return read_layout(checkpoint.path / LAYOUT, sizes)
    except DamagedError as damage:
        raise DamagedCheckpointError(checkpoint.path, str(damage)) from damage


def tensor_facts(checkpoint: Checkpoint) -> dict[str, TensorFacts]:
    """What tensors there are.

    Raises:
        DamagedCheckpointError: the layout cannot be trusted.
    """
    found = _layout(checkpoint).state_dict_metadata
    return {
        name: TensorFacts(value.size, value.properties.dtype)  # type: ignore[union-attr]  # tensors only
        for name, value in found.items()
    }


def read_tensors(checkpoint: Checkpoint, targets: Mapping[str, Tensor]) -> None:
    """Fill ``targets`` in place, each with what was saved under its name; of a DTensor this rank's shard.

    Args:
        checkpoint: verified.
        targets: of the saved shapes; of any dtype, strategy and number of ranks.

    Raises:
        DamagedCheckpointError: a file is not what was written.
        CheckpointError: it is, and torch cannot load it.
        OSError: a file cannot be read.
    """
    # Inference on parameters: copy_ into a leaf that requires a gradient is refused otherwise.
    state = {name: target.detach() for name, target in targets.items()}
    reader = _Reader(checkpoint)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    metadata = reader.read_metadata()
    try:
        with torch.no_grad():
            planner.set_up_planner(state, metadata, is_coordinator=True)
            reader.set_up_storage_reader(metadata, is_coordinator=True)
            plan = reader.prepare_local_plan(planner.create_local_plan())
            (plan,) = planner.create_global_plan([plan])
            reader.read_data(planner.finish_plan(plan), planner).wait()
    except Exception as error:  # torch's own; a file of the right size may hold anything
        names = {info.relative_path for info in metadata.storage_data.values()}
        raise _not_loaded(checkpoint, names, error) from error


def rank_file(rank: int) -> str:
    """The name of a rank's own file."""
    return f"rank-{rank}.pt"


def read_private(checkpoint: Checkpoint, rank: int) -> dict[str, Any]:
    """What a rank saved for itself; any rank may read any rank's.

    Args:
        checkpoint: verified.
        rank: of the ranks that saved it.

    Raises:
        DamagedCheckpointError: it is not there, or is not what was written, or not a dict of tensors and plain values.
        CheckpointError: torch cannot load it.
        OSError: it cannot be read.
    """
    name = rank_file(rank)
    if name not in checkpoint.manifest.files:
        raise DamagedCheckpointError(checkpoint.path, f"{name} is missing")
    try:
        found = torch.load(checkpoint.path / name, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _not_loaded(checkpoint, [name], error) from error
    if not isinstance(found, dict):
        raise DamagedCheckpointError(checkpoint.path, f"{name} does not hold what a rank saves")
    return found


def _not_loaded(checkpoint: Checkpoint, names: Iterable[str], error: Exception) -> CheckpointError:
    """What to raise where torch fails: damage if the digests say so, or if what is there is nothing that torch saves.

    Otherwise a lack of memory or another torch are the likelier reasons. A system's error is none: torch also has one
    where a file leads it astray, and one that is real comes again with the digests.
    """
    try:
        checkpoint.check_digests(names)
    except DamagedError as damage:
        return DamagedCheckpointError(checkpoint.path, str(damage))
    text = str(error).strip()
    if named := re.search(r"GLOBAL (\S+)", text):  # torch's words go on to say how to load it all the same
        reason = f"it holds {named[1]}, which no checkpoint needs and which could run code"
        return DamagedCheckpointError(checkpoint.path, reason)
    if "Weights only load failed" in text:
        return DamagedCheckpointError(checkpoint.path, "it holds something else than tensors and plain values")
    words = next(iter(text.splitlines()), type(error).__name__)
    return CheckpointError(
        f"{checkpoint.path} cannot be loaded, though its files are as they were written: {words}. See that there is "
        "memory enough, and that torch is the one that has written it; to take the one before it, move this one out of "
        "its folder."
    )

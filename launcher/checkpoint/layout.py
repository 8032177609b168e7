"""Where each tensor of a checkpoint lies in its files: DCP's ``.metadata``, read so that it cannot run anything.

``.metadata`` is a pickle, and whoever wrote it decides what an ordinary unpickler calls. Here every name that it may
use stands for an inert holder of values, any other name is refused, and torch's objects are made afterwards
from what the holders hold, once that has been checked.

Private names of torch that are relied on, all in this file: ``filesystem._StorageInfo`` and its fields.
``tests/unit/test_checkpoint_loading.py`` notices a change.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from launcher.checkpoint.manifest import DamagedError

__all__ = ["LAYOUT", "read_layout"]

LAYOUT = ".metadata"


class _Holder:
    """Keeps what a pickle would have made an object from."""

    __slots__ = ("arguments", "state")

    kind: str
    """The name that it stands for."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


_METADATA = "torch.distributed.checkpoint.metadata"
_HELD = {
    (_METADATA, "Metadata"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
}


class _InertUnpickler(pickle.Unpickler):
    """Makes holders, tuples and dtypes, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _HELD:
            # A class of its own for each reading: a pickle can set attributes on what it names.
            return type(name, (_Holder,), {"__slots__": (), "kind": name})
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise DamagedError(f"{LAYOUT} names {module}.{name}, which no checkpoint needs; it is not loaded")


def read_layout(path: Path, sizes: Mapping[str, int]) -> Metadata:
    """The content of a ``.metadata`` file, with nothing in it but tensors in the files of ``sizes``.

    Args:
        path: the file.
        sizes: the checkpoint's files and how long each is.

    Raises:
        DamagedError: it is not such a file.
    """
    try:
        with path.open("rb") as file:
            held = _InertUnpickler(file).load()
        content = _state(held, "Metadata")
        tensors = {_name(name): _tensor(value) for name, value in content["state_dict_metadata"].items()}
        places = dict(_place(index, info, sizes) for index, info in content["storage_data"].items())
        for name, tensor in tensors.items():
            if any(MetadataIndex(name, chunk.offsets) not in places for chunk in tensor.chunks):
                raise DamagedError(f"{LAYOUT} does not say where all of {name} is")
    except DamagedError:
        raise
    except Exception as error:  # whatever an arbitrary file does to an unpickler
        raise DamagedError(f"{LAYOUT} is not what DCP writes ({type(error).__name__}: {error})") from error
    return Metadata(tensors, storage_data=places)  # type: ignore[arg-type]


def _state(held: Any, kind: str) -> dict[str, Any]:
    if not isinstance(held, _Holder) or held.kind != kind or not isinstance(held.state, dict):
        raise DamagedError(f"{LAYOUT} has something else where a {kind} should be")
    return held.state


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise DamagedError(f"{LAYOUT} has a name that is not a string")
    return value


def _counts(value: Any) -> torch.Size:
    if not isinstance(value, tuple) or any(type(number) is not int or number < 0 for number in value):
        raise DamagedError(f"{LAYOUT} has a shape or offset that is not made of counts")
    return torch.Size(value)


def _tensor(held: Any) -> TensorStorageMetadata:
    state = _state(held, "TensorStorageMetadata")
    dtype = state["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise DamagedError(f"{LAYOUT} has a tensor without a dtype")
    size = _counts(state["size"])
    chunks = []
    for chunk in state["chunks"]:
        values = _state(chunk, "ChunkStorageMetadata")
        offsets, sizes = _counts(values["offsets"]), _counts(values["sizes"])
        if not len(offsets) == len(sizes) == len(size):
            raise DamagedError(f"{LAYOUT} has a piece of a tensor with another number of dimensions")
        if any(start + length > whole for start, length, whole in zip(offsets, sizes, size, strict=True)):
            raise DamagedError(f"{LAYOUT} has a piece of a tensor that is not inside of it")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    if sum(chunk.sizes.numel() for chunk in chunks) != size.numel():
        raise DamagedError(f"{LAYOUT} has a tensor whose pieces are not the whole of it")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _place(index: Any, info: Any, sizes: Mapping[str, int]) -> tuple[MetadataIndex, _StorageInfo]:
    key, place = _state(index, "MetadataIndex"), _state(info, "_StorageInfo")
    file, offset, length = place["relative_path"], place["offset"], place["length"]
    if file not in sizes:
        raise DamagedError(f"{LAYOUT} leads to {file!r}, which is not one of the checkpoint's files")
    if place.get("transform_descriptors"):
        raise DamagedError(f"{LAYOUT} asks for a transformation of {file}")
    if type(offset) is not int or type(length) is not int or not 0 <= offset <= offset + length <= sizes[file]:
        raise DamagedError(f"{LAYOUT} leads outside of {file}")
    return MetadataIndex(_name(key["fqn"]), _counts(key["offset"])), _StorageInfo(file, offset, length)

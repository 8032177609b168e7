"""Weights to begin with, from a file: every rank takes its part, whatever the strategy and the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from launcher.errors import RequestError

__all__ = ["load_initial_weights"]

_SHOWN = 10


@torch.no_grad()
def load_initial_weights(module: nn.Module, path: Path) -> None:
    """Fill a model, laid out over the ranks, from a .safetensors file; no communication.

    The file must hold exactly the names of the model's ``state_dict``; of tied weights one name is enough, and
    what modules give as ``get_extra_state`` may be left out. One tensor of the file is in memory at a time.

    Args:
        module: parameters plain or DTensors; changed in place.
        path: as ``launch export`` writes it, or anybody else.

    Raises:
        RequestError: the file is none, or its names or shapes are not the model's, all in one message.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():  # to open a pipe would wait for ever
        raise RequestError(
            f"train.init_from={path} cannot be read: it is no file. Give one as launch export writes it."
        )
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  not a dict
            places, holders = _places(module), _holders(module)
            _check(places, {name: shape for name, shape in shapes.items() if name not in holders}, path)
            _check_values(places, file, path)
            for name in shapes:
                value = file.get_tensor(name)
                if name in holders:
                    holders[name].set_extra_state(value)
                else:
                    _fill(places[name], value)
    except (SafetensorError, OSError) as error:
        raise RequestError(f"train.init_from={path} cannot be read as a .safetensors file: {error}.") from error


def _places(module: nn.Module) -> dict[str, Tensor]:
    """Where each name's value lives: parameters and persistent buffers, tied ones under every name."""
    found = module.state_dict(keep_vars=True).items()
    return {name: value for name, value in found if isinstance(value, Tensor) and not _is_extra(name)}


def _holders(module: nn.Module) -> dict[str, nn.Module]:
    """The modules with extra state, by its name."""
    names = filter(_is_extra, module.state_dict(keep_vars=True))
    return {name: module.get_submodule(name.rpartition(".")[0]) for name in names}


def _is_extra(name: str) -> bool:
    return name.rpartition(".")[2] == "_extra_state"


def _check(places: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    given = {id(places[name]) for name in shapes if name in places}
    problems = [
        *_listed("missing in the file", [name for name, place in places.items() if id(place) not in given]),
        *_listed("not in the model", [name for name in shapes if name not in places]),
        *_listed("of another shape", list(_misshapen(places, shapes))),
    ]
    if problems:
        raise RequestError(
            "\n".join([f"train.init_from={path} does not fit the model:", *problems, "Give weights of this model."])
        )


def _check_values(places: dict[str, Tensor], file: Any, path: Path) -> None:
    """Refuse numbers of which the model's would keep a part, and tied weights that differ from name to name."""
    problems, first = [], dict[int, str]()
    for name in sorted(places.keys() & set(file.keys())):
        place, sort = places[name], file.get_slice(name).get_dtype()  # such as BF16, I64 or C64
        if ("C" in sort) > place.is_complex() or ("F" in sort) > (place.is_floating_point() or place.is_complex()):
            problems.append(f"{name} ({sort} in the file, {place.dtype} in the model)")
        other = first.setdefault(id(place), name)
        if other != name and not torch.equal(file.get_tensor(name), file.get_tensor(other)):
            problems.append(f"{name} and {other} (one and the same in the model, and they differ in the file)")
    if problems:
        listed = _listed("with other values than it can have", problems)
        raise RequestError(
            "\n".join([f"train.init_from={path} does not fit the model:", *listed, "Give weights of this model."])
        )


def _misshapen(places: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    for name, shape in shapes.items():
        if name in places and tuple(places[name].shape) != shape:
            yield f"{name} ({list(shape)} in the file, {list(places[name].shape)} in the model)"


def _listed(title: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"  {title}: {', '.join(names[:_SHOWN])}{more}"]


def _fill(place: Tensor, value: Tensor) -> None:
    if isinstance(place, DTensor):
        whole = value.to(device=place.device, dtype=place.dtype)
        # Every rank has read the same value and takes its part.
        place.copy_(distribute_tensor(whole, place.device_mesh, place.placements, src_data_rank=None))
    else:
        place.copy_(value)

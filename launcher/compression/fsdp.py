"""What FSDP2 does not say in public: which parameters it reduces together, how they are cut, and who trains them.

Private calls into torch: the modules' parameter groups (their order, names and shapes, for the errors that are kept);
their ``post_backward``, which is the last to know which parameters have a gradient; and their ``mesh_info``, which is
set to that of one replica where the replicas are ours to average: ``tests/ranks/test_compression_fsdp.py`` notices a
change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import DDPMeshInfo, FSDPMeshInfo
from torch.distributed.tensor import DTensor

from launcher.compression.trainers import Trainers
from launcher.errors import ConfigurationError

__all__ = [
    "full_name",
    "has_replicas",
    "has_shards",
    "leave_replicas_alone",
    "parameter_groups",
    "refuse_several_meshes",
    "rows_of",
    "tell_present",
    "trainers_of",
]


def parameter_groups(module: FSDPModule) -> list[Any]:
    """What FSDP2 reduces together; one for each module, unless parameters have meshes of their own."""
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # before torch 2.12
        groups = [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def refuse_several_meshes(model: nn.Module) -> None:
    """Raises ConfigurationError if parameters of one FSDP2 module are on meshes of their own."""
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule) and len(parameter_groups(module)) > 1:
            raise ConfigurationError(
                f"The parameters of {name or 'the model'} are on several meshes (shard_placement_fn), and torch lets "
                "nobody take over their reductions: call fully_shard on the parts that have a mesh of their own."
            )


def has_replicas(model: nn.Module) -> bool:
    """Whether FSDP2 averages between whole copies too."""
    return any(isinstance(info, DDPMeshInfo) for info in _mesh_infos(model))


def has_shards(model: nn.Module) -> bool:
    """Whether all is sharded that FSDP2 has; its ``replicate`` makes whole copies alone."""
    return all(isinstance(info, FSDPMeshInfo) for info in _mesh_infos(model))


def _mesh_infos(model: nn.Module) -> Iterator[Any]:
    modules = (module for module in model.modules() if isinstance(module, FSDPModule))
    yield from (group.mesh_info for module in modules for group in parameter_groups(module))


def trainers_of(model: nn.Module) -> Trainers | None:
    """The ranks that train the model; None: all."""
    meshes = [each.device_mesh for each in model.parameters() if isinstance(each, DTensor)]
    mesh = max(meshes, key=lambda each: each.size(), default=None)
    if mesh is None or mesh.size() == dist.get_world_size():
        return None
    return Trainers.of_mesh(mesh)


def leave_replicas_alone(group: Any) -> None:
    """Let FSDP2 reduce over the shards only, as if there were no other replica."""
    info = group.mesh_info
    if group.post_forward_mesh_info is not None and group.post_forward_mesh_info != info:
        raise ValueError(
            "fully_shard(reshard_after_forward=<a number>) cannot go with compressed replicas: use True or False."
        )
    group.mesh_info = FSDPMeshInfo(mesh=info.mesh, shard_mesh_dim=info.shard_mesh_dim)
    if group.post_forward_mesh_info is not None:
        group.post_forward_mesh_info = group.mesh_info


def tell_present(group: Any, tell: Callable[[tuple[Any, ...]], None]) -> None:
    """Before a parameter group reduces, call ``tell`` with those of its parameters that have a gradient."""
    post_backward = group.post_backward

    def about_to_reduce(*arguments: Any) -> None:
        zeros = getattr(group, "reduce_scatter_unused_params", False)  # not in torch 2.11
        tell(tuple(each for each in group.fsdp_params if _is_reduced(each, zeros)))
        post_backward(*arguments)

    group.post_backward = about_to_reduce


def _is_reduced(parameter: Any, zeros: bool) -> bool:
    """As FSDP2 asks."""
    unsharded = getattr(parameter, "_unsharded_param", None)
    if unsharded is None:
        return False
    has_gradient = parameter.unsharded_accumulated_grad is not None or unsharded.grad is not None
    return has_gradient or (zeros and unsharded.requires_grad)


def full_name(parameter: Any, name: str, num_shards: int) -> str:
    """``name``; with what sets its elements apart where rows of it are not what is sharded, or not all of them.

    Errors move between such parts only where they are cut in the same way.
    """
    dim = parameter.fsdp_placement.dim
    if dim:
        name += f"@dim{dim}of{num_shards}"
    spec = getattr(parameter, "_unsharded_dtensor_spec", None) or getattr(parameter, "_tp_spec", None)  # torch 2.11
    if spec is not None:  # a part of it already: tensor parallelism
        ours: frozenset[int] = getattr(parameter, "_dp_dim_indices", frozenset())
        others = [axis for axis in range(spec.mesh.ndim) if axis not in ours]
        name += "".join(f"@{spec.mesh.get_local_rank(axis)}of{spec.mesh.size(axis)}" for axis in others)
    return name


def rows_of(parameter: Any, num_shards: int) -> torch.Size:
    """The shape in which FSDP2 reduces a parameter: shards of another dimension than the first lie below each other."""
    dim, shape = parameter.fsdp_placement.dim, list(parameter._orig_size)
    if dim:
        shape[0] *= num_shards
        shape[dim] //= num_shards
    return torch.Size(shape)

"""The ranks that train a model, which may be some of all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Trainers"]


@dataclass(frozen=True)
class Trainers:
    """This rank's view of them."""

    size: int = 1
    rank: int = 0
    """In the order of their ranks in the whole job."""
    axes: tuple[dist.ProcessGroup, ...] = ()
    """Groups of this rank's, one for each dimension of the mesh that they are."""

    @classmethod
    def of_group(cls, group: dist.ProcessGroup | None) -> Trainers:
        """All of a group; None: all ranks of the job."""
        if group is None and not dist.is_initialized():
            return cls()
        group = group or dist.group.WORLD
        assert group is not None
        return cls(group.size(), group.rank(), (group,))

    @classmethod
    def of_mesh(cls, mesh: DeviceMesh) -> Trainers:
        """All of a mesh. A group of them all would be one more that torch's ``new_group`` can fail to make."""
        ranks = sorted(mesh.mesh.flatten().tolist())
        return cls(len(ranks), ranks.index(dist.get_rank()), tuple(mesh.get_all_groups()))

    def all_agree(self, vote: bool, device: torch.device) -> bool:
        """Whether all vote so; collective, on ``device``."""
        votes = torch.tensor(float(vote), device=device)
        for axis in self.axes:
            dist.all_reduce(votes, op=dist.ReduceOp.MIN, group=axis)
        return bool(votes.item())

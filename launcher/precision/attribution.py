"""Where an overflow came from: which parameters, on which ranks, before or after the wire.

Asked only when a step has overflowed. All ranks have read the same numbers by then, so all come here
after the same step, and one more collective is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from launcher.precision.folded import Gradients

__all__ = ["Attribution", "attribute"]

_SHOWN = 10


@dataclass(frozen=True)
class Attribution:
    """The diagnosis of one overflow; the same on every rank."""

    parameters: tuple[str, ...]
    """Module paths of the first ten parameters whose gradient was not finite."""
    num_parameters: int
    """How many there were."""
    ranks: tuple[int, ...]
    """Ranks whose own gradients were not finite."""
    hosts: tuple[str, ...]
    """Of these ranks."""
    before_wire: bool | None
    """False: every rank's own were finite, and the sum was not. None: nobody has looked."""


def attribute(
    gradients: Gradients,
    norms: torch.Tensor,
    names: Sequence[str],
    origins: Sequence[int] | None,
    hosts: Sequence[str],
) -> Attribution:
    """Agree on the names; collective.

    Args:
        gradients: which parameters had a gradient in that step.
        norms: (gradients,): this rank's measure of them.
        names: of all trained parameters, in the optimizer's order.
        origins: ranks whose gradients were not finite before the wire; None if nobody has looked.
        hosts: each rank's host.
    """
    bad = torch.zeros(len(names), dtype=torch.int32, device=norms.device)
    if gradients.indices:
        bad[torch.tensor(gradients.indices, device=norms.device)] = (~norms.isfinite()).int()
    if len(hosts) > 1:
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    found = [name for name, flag in zip(names, bad.tolist(), strict=True) if flag]
    ranks = tuple(origins or ()) if len(hosts) > 1 else (0,)
    looked = origins is not None or len(hosts) == 1
    return Attribution(
        parameters=tuple(found[:_SHOWN]),
        num_parameters=len(found),
        ranks=ranks,
        hosts=tuple(hosts[rank] for rank in ranks),
        before_wire=bool(ranks) if looked else None,
    )

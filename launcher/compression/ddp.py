"""What DistributedDataParallel does not say in public: its final buckets, and which parameters some rank has used.

Private calls into torch, all on ``model.reducer``: ``tests/ranks/test_compression_conserved.py`` notices a change.
"""

from __future__ import annotations

import weakref

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Usage", "settle_buckets"]


def settle_buckets(model: DistributedDataParallel) -> bool:
    """Make DDP build its final buckets now; collective. Whether it was possible.

    DDP builds them anew after its first backward pass, so that what is kept for a bucket would lose its place, and a
    resumed run would add up in another order than one that was never stopped. One pass of zeros, last parameter
    first, is that first pass. Does nothing where it would be noticed: gradients that are there already, hooks on
    them, sparse gradients.
    """
    if model.reducer._rebuild_buckets():  # after the one backward pass that there has been
        return True
    if not _trained(model) or _would_be_noticed(model):
        return False
    _pass_zeros(model)
    model.reducer._rebuild_buckets()
    return True


class Usage:
    """Which parameters some rank has used: what DDP has counted to decide which gradients it leaves alone.

    Args:
        model: whose counts they are; it is not held. The tensor is taken now, since asking for it in a hook would wait
            for ever.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self._model = weakref.ref(model)
        self._counts = model.reducer._get_local_used_map()
        self._parameters = _trained(model)

    def unused(self) -> list[nn.Parameter]:
        """By all ranks in the last step; none if DDP does not ask (``find_unused_parameters``).

        On CUDA this waits for the device, as DDP does too when a parameter is unused.
        """
        model = self._model()
        if model is None or not model.find_unused_parameters or model.static_graph:
            return []
        if self._counts.numel() != len(self._parameters):  # some were frozen in between: whose these are is not known
            return []
        counts = self._counts.tolist()
        return [parameter for parameter, count in zip(self._parameters, counts, strict=True) if not count]


def _pass_zeros(model: DistributedDataParallel) -> None:
    """A backward pass that leaves nothing, last parameter first."""
    parameters = _trained(model)
    zero = torch.zeros((), device=parameters[0].device)
    with torch.enable_grad():
        for parameter in parameters:
            zero = zero + (parameter.sum() * 0.0).float()
    model.reducer.prepare_for_backward([zero] if model.find_unused_parameters else [])
    zero.backward()  # type: ignore[no-untyped-call]
    for parameter in parameters:
        parameter.grad = None


def _trained(model: DistributedDataParallel) -> list[nn.Parameter]:
    ignored = set(model.parameters_to_ignore)
    return [each for name, each in model.module.named_parameters() if each.requires_grad and name not in ignored]


def _would_be_noticed(model: DistributedDataParallel) -> bool:
    parameters = _trained(model)
    sparse = any(getattr(module, "sparse", False) for module in model.module.modules())
    hooked = any(each._backward_hooks or each._post_accumulate_grad_hooks for each in parameters)
    return sparse or hooked or model.static_graph or any(each.grad is not None for each in parameters)

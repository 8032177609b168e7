"""One number that says whether two models are the same."""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from torch.distributed.tensor import DTensor

__all__ = ["parameters_digest"]


def parameters_digest(module: nn.Module) -> str:
    """SHA-256, in hexadecimal, over all parameters as FP32 in C order, in the order of their names.

    The same for the same values, whatever the strategy and the number of ranks. A parameter with
    several names counts once. Collective where parameters are sharded; one is gathered at a time.
    """
    digest = hashlib.sha256()
    for _, parameter in sorted(module.named_parameters(), key=lambda item: item[0]):
        values = parameter.detach()
        if isinstance(values, DTensor):
            values = values.full_tensor()
        values = values.to(device="cpu", dtype=torch.float32).contiguous()
        digest.update(values.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

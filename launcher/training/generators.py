"""The state of this process' random generators: Python's, NumPy's, torch's on the CPU and on its GPU."""

from __future__ import annotations

import random
from typing import Any

import torch

__all__ = ["check", "set_state", "state"]


def state(device: torch.device) -> dict[str, Any]:
    """As tensors and plain values."""
    import numpy

    version, words, gauss = random.getstate()
    numpy_state: Any = numpy.random.get_state()
    numpy_kind, numpy_words, place, has_gauss, numpy_gauss = numpy_state
    found = {
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": [numpy_kind, torch.from_numpy(numpy_words.astype("int64")), place, has_gauss, numpy_gauss],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def check(saved: dict[str, Any], device: torch.device) -> None:
    """See that ``saved`` is what ``state`` gives, by setting it and setting back what there was; raises if not."""
    before = state(device)
    for name in before.keys() & saved.keys():
        for built, value in zip(_flat(before[name]), _flat(saved[name]), strict=True):
            if type(value) is not type(built) and {type(value), type(built)} - {type(None), float}:
                raise TypeError(f"the state of {name}'s generator has a {type(value).__name__}")
    try:
        set_state(saved, device)
    finally:
        set_state(before, device)


def _flat(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def set_state(saved: dict[str, Any], device: torch.device) -> None:
    """The inverse of ``state``; a GPU's is left alone if a CPU's run was saved."""
    import numpy

    version, words, gauss = saved["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, numpy_words, place, has_gauss, numpy_gauss = saved["numpy"]
    if not 0 <= place <= len(numpy_words):  # NumPy reads there without looking
        raise ValueError(f"NumPy's generator stands at {place} of {len(numpy_words)} words")
    numpy.random.set_state((kind, numpy_words.numpy().astype("uint32"), place, has_gauss, numpy_gauss))
    torch.set_rng_state(saved["torch"].clone())
    if device.type == "cuda" and "cuda" in saved:
        torch.cuda.set_rng_state(saved["cuda"].clone(), device)

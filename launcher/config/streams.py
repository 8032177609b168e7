"""Which IterableDatasets cannot be used: those whose place in the data could not be restored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from launcher.job import Job

__all__ = ["stream_problem", "streams_without_state"]

_METHODS = ("state_dict", "load_state_dict")


def stream_problem(job: Job, split: str, dataset: object) -> str | None:
    """Why an IterableDataset cannot be used for a split; None for every other dataset, and for one that can.

    Whether checkpoints are enabled does not matter: a run may be gone on with when they are.
    """
    from torch.utils.data import IterableDataset

    if not isinstance(dataset, IterableDataset):
        return None
    missing = [method for method in _METHODS if not hasattr(dataset, method)]
    made = f"{type(job).__name__}.build_dataset({split!r}) returned an IterableDataset ({type(dataset).__name__})"
    instead = "return a map-style dataset, with __len__ and __getitem__"
    if split != "train":
        return f"{made} to validate on, whose place in the data cannot be restored: {instead}."
    if missing:
        named = " and ".join(missing)
        return f"{made} without {named}, whose place in the data cannot be restored: {instead}, or add {named}."
    return None


def streams_without_state() -> Iterator[type[Any]]:
    """The classes, torch's own apart, that have been imported and would have to be refused."""
    from torch.utils.data import IterableDataset

    waiting: list[type[Any]] = [IterableDataset]
    while waiting:
        for kind in waiting.pop().__subclasses__():
            waiting.append(kind)
            if kind.__module__.partition(".")[0] != "torch" and not all(hasattr(kind, name) for name in _METHODS):
                yield kind

"""Whether a value from a checkpoint can take the place of one that a fresh learner has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from launcher.checkpoint.loading import TensorFacts
from launcher.errors import CheckpointError

__all__ = ["fitting", "kind", "require_like"]


@contextmanager
def fitting(path: object) -> Iterator[None]:
    """Where a checkpoint is compared with what has been built: what differs may well be the user's to undo.

    Args:
        path: the checkpoint.

    Raises:
        CheckpointError: in place of a ValueError.
    """
    try:
        yield
    except ValueError as error:
        raise CheckpointError(
            f"{path} does not fit what this run builds now: {error}. Undo the change to the model or the optimizer, or "
            "start a new run (train.init_from takes weights along)."
        ) from error


def kind(value: Tensor | TensorFacts) -> str:
    """What sort of numbers a tensor has: those of one sort can be loaded as each other."""
    if value.dtype.is_complex:
        return "complex"
    return "floating" if value.dtype.is_floating_point else "whole"


def require_like(saved: object, built: object, name: str) -> None:
    """See that a saved value can take the place of one that was built: numbers of one shape and sort, or one type.

    Raises:
        ValueError: naming it.
    """
    if isinstance(built, Tensor):
        if not isinstance(saved, (Tensor, TensorFacts)) or saved.shape != built.shape or kind(saved) != kind(built):
            raise ValueError(f"{name} is {_described(saved)} instead of {_described(built)}")
    elif isinstance(built, (bool, int, float)):
        if not isinstance(saved, (bool, int, float)):
            raise ValueError(f"{name} is {_described(saved)} instead of a number")
    elif built is not None and type(saved) is not type(built):
        raise ValueError(f"{name} is {_described(saved)} instead of {_described(built)}")


def _described(value: object) -> str:
    if isinstance(value, (Tensor, TensorFacts)):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    return f"a {type(value).__name__}"

"""Numbers that must not be too small."""

from __future__ import annotations

import math
from collections.abc import Iterator

__all__ = ["at_least", "positive"]


def at_least(name: str, value: float | None, least: float) -> Iterator[str]:
    """What is wrong with a number, if it is set."""
    if value is not None and not value >= least:
        yield f"{name}={value} is too small: it must be at least {least}."


def positive(name: str, value: float | None) -> Iterator[str]:
    """What is wrong with a number, if it is set."""
    if value is not None and not (value > 0 and math.isfinite(value)):
        yield f"{name}={value} must be a finite number greater than 0."

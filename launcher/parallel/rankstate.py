"""State of a parallel model that differs by rank, beside its weights: the error feedback of compressed gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

__all__ = ["NoRankState", "RankState"]


class RankState(Protocol):
    """What a checkpoint needs of such state."""

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's, by name; not copied."""

    def load_state_dict(self, read: Callable[[int], Mapping[str, Tensor]], saved_world_size: int) -> None:
        """Take up what was saved.

        Args:
            read: what a rank of the saving run had saved; any rank's may be read, each costs a look into its file.
            saved_world_size: how many ranks there were.
        """


class NoRankState:
    """There is none."""

    def state_dict(self) -> dict[str, Tensor]:
        """Empty."""
        return {}

    def load_state_dict(self, read: Callable[[int], Mapping[str, Tensor]], saved_world_size: int) -> None:
        """Nothing to take up."""

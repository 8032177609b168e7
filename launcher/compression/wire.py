"""The wire as a training loop sees it: where a step begins and ends, what was sent and lost, what is to be saved."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from launcher.compression.feedback import Feedback
from launcher.compression.layout import Slice, parse_key, slice_key
from launcher.compression.terms import StepTerms
from launcher.compression.trainers import Trainers

__all__ = ["Counter", "Keeper", "Residue", "Wire"]

_WEIGHT = "weight"


@dataclass
class Residue:
    """The errors of one flat tensor on this rank, and whose they are."""

    kind: str
    """Tells apart what may hold errors of the same elements."""
    feedback: Feedback
    slices: tuple[Slice, ...]
    """Where in the feedback the elements of which parameter are."""
    weight: float
    """What an error here counts in the mean over all ranks."""
    share: float
    """The part of an element's errors, added up over all ranks, that this rank takes when they are shared out anew."""


class Counter(Protocol):
    """Whatever counts what it sends."""

    bytes_sent: int


class Keeper(Protocol):
    """State of a codec beside its errors (PowerSGD's factors)."""

    def settle(self, found_inf: Tensor) -> None:
        """The step was applied (0) or skipped (1)."""

    def state_dict(self) -> dict[str, Tensor]:
        """By name."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what belongs to it; the rest is not its own."""

    def names(self) -> set[str]:
        """Of all that it could take up."""


class Wire:
    """What crosses the wire for one model's gradients.

    A loop with a loss scale calls ``begin`` before a step's backward passes and ``conclude`` after its optimizer step.
    In a loop that does not, the loss scale is read from ``scaler`` (or is 1) when a step's first gradients cross, and
    the errors of a step whose gradients did not come back finite are forgotten.

    Args:
        device: where the gradients live.
        scaler: with ``get_scale()``, such as torch.amp.GradScaler; for loops that do not call ``begin``.
    """

    def __init__(self, device: torch.device, scaler: Any = None) -> None:
        self.device = device
        self.terms = StepTerms(device)
        self.residues: list[Residue] = []
        self.counters: list[Counter] = []
        self.keepers: list[Keeper] = []
        self.passing: list[Feedback] = []
        """Errors of steps in which parameters are missing; saved as a part of the residues."""
        self.before_state: list[Callable[[], None]] = []
        """Called before the residues' errors are read or set: brings them there."""
        self.before_settling: list[Callable[[], None]] = []
        """Called when a step's errors have been written, before they take the place of the last step's."""
        self.keeps_errors = False
        """Whether a codec keeps anything from one step for the next."""
        self.trainers: Trainers | None = None
        """The ranks that train the model; None: all."""
        self._scaler = scaler
        self._is_told = False
        self._crossed: set[Hashable] = set()

    def begin(self, loss_scale: Tensor, measures: bool = False) -> None:
        """A step begins.

        Args:
            loss_scale: what its gradients are multiplied by, an FP32 scalar on the device.
            measures: whether to measure what encoding loses; see ``take_lost``.
        """
        self._is_told = True
        self.terms.looks = False
        self.terms.begin(loss_scale, measures)

    def conclude(self, found_inf: Tensor) -> None:
        """The step was applied (``found_inf`` is 0) or skipped (1): an FP32 scalar on the device."""
        for prepare in self.before_settling:
            prepare()
        for feedback in (*(residue.feedback for residue in self.residues), *self.passing):
            feedback.settle(found_inf)
        for keeper in self.keepers:
            keeper.settle(found_inf)

    def forget(self, feedbacks: Sequence[Feedback], gather: Callable[[], None] | None = None) -> None:
        """These are nobody's errors any more."""
        gone = {id(feedback) for feedback in feedbacks}
        self.residues = [each for each in self.residues if id(each.feedback) not in gone]
        self.passing = [each for each in self.passing if id(each) not in gone]
        self.before_state = [each for each in self.before_state if each != gather]

    def crossing(self, key: Hashable) -> None:
        """A flat tensor is about to cross; the second time that one does, a new step has begun."""
        if self._is_told:
            return
        if not self._crossed or key in self._crossed:
            self._conclude_by_looks()
            scale = float(self._scaler.get_scale()) if self._scaler is not None else 1.0
            self.terms.begin(torch.full((), scale, device=self.device), measures=False)
            self.terms.looks = self.keeps_errors
        self._crossed.add(key)

    def crossed(self, result: Tensor) -> None:
        """A flat tensor has come back, by a way that does not look at it itself."""
        self.terms.look(result)

    def _conclude_by_looks(self) -> None:
        """The last step was applied if all that came back was finite, and all that was lost: what this rank has sent
        may have spoilt a shard that is another's.

        So ranks may keep or forget differently; each does what is right for its own.
        """
        self._crossed.clear()
        self.conclude(self.terms.take_non_finite().float())

    def take_bytes(self) -> int:
        """Bytes that this rank has sent for gradients since the last call."""
        total = 0
        for counter in self.counters:
            total += counter.bytes_sent
            counter.bytes_sent = 0
        return int(total)

    def take_lost(self) -> Tensor:
        """This rank's sums of squares, float64 (2,) on the device: of what encoding has lost in the steps that measured
        since the last call, and of what was encoded."""
        lost = self.terms.lost.clone()
        self.terms.lost.zero_()
        return lost

    def state_dict(self) -> dict[str, Tensor]:
        """What this rank must have again to go on as if nothing had happened; other ranks' differ.

        Errors are flat slices of parameters, FP32, by name, in units of the true gradient. Call it between steps.
        """
        if not self._is_told and self._crossed:
            self._conclude_by_looks()
        self._gather()
        state: dict[str, Tensor] = {}
        for residue in self.residues:
            state[f"{_WEIGHT}/{residue.kind}"] = torch.tensor(residue.weight, dtype=torch.float64)
            for part in residue.slices:
                state[slice_key(residue.kind, part)] = residue.feedback.kept[part.offset : part.offset + part.length]
        for keeper in self.keepers:
            state.update(keeper.state_dict())
        return state

    def check(self, saved: Mapping[str, Tensor]) -> None:
        """See that ``saved`` can be what ``state_dict`` has given, on whatever rank; raises ValueError if not."""
        for key, value in saved.items():
            if not isinstance(key, str) or not isinstance(value, Tensor):
                raise ValueError(f"the wire's state has a {type(value).__name__} as {key!r}")
            is_number = _is_weight(key) or key.endswith(".steps")
            fits = value.numel() == 1 if is_number else value.ndim == 1 and value.is_floating_point()
            if not fits or value.is_complex():
                raise ValueError(f"the wire's state has {tuple(value.shape)} numbers of {value.dtype} as {key!r}")

    def load_state_dict(self, read: Callable[[int], Mapping[str, Tensor]], saved_world_size: int) -> None:
        """Take up what ``saved_world_size`` ranks have saved; collective, before the first step.

        Where ranks, strategy and buckets are what they were, each rank takes its own, to the last bit. Otherwise all
        errors are added up and shared out among those that will send: what the next mean gains is the same.

        Args:
            read: gives what a rank has saved, on any device.
            saved_world_size: how many ranks there were.
        """
        trainers = self.trainers or Trainers.of_group(None)
        saved = read(trainers.rank) if trainers.rank < saved_world_size else {}
        self._gather()
        kept = saved if trainers.size == saved_world_size else self._found(saved, read, saved_world_size)
        for keeper in self.keepers:
            keeper.load_state_dict(kept)
        own = self._own_slices()
        mine = {
            key: value for key, value in saved.items() if parse_key(key)[0] in {each.kind for each in self.residues}
        }
        same = {key: value.shape for key, value in own.items()} == {key: value.shape for key, value in mine.items()}
        if trainers.all_agree(trainers.size == saved_world_size and same, self.device):
            for key, value in own.items():
                value.copy_(mine[key])
        else:
            self._share_out(self._added_up(read, saved_world_size))

    def _gather(self) -> None:
        for gather in self.before_state:
            gather()

    def _found(
        self, own: Mapping[str, Tensor], read: Callable[[int], Mapping[str, Tensor]], saved_world_size: int
    ) -> dict[str, Tensor]:
        """What the keepers could take up: this rank's own, or what the first of the others has."""
        found = dict(own)
        missing = {name for keeper in self.keepers for name in keeper.names()} - found.keys()
        for rank in range(saved_world_size):
            if missing:
                other = read(rank)
                found |= {name: other[name] for name in missing & other.keys()}
                missing -= other.keys()
        return found

    def _own_slices(self) -> dict[str, Tensor]:
        return {
            slice_key(residue.kind, part): residue.feedback.kept[part.offset : part.offset + part.length]
            for residue in self.residues
            for part in residue.slices
        }

    def _added_up(self, read: Callable[[int], Mapping[str, Tensor]], saved_world_size: int) -> dict[str, Tensor]:
        """All saved errors as what they add to the mean: whole flat parameters of which this rank has a part."""
        sizes: dict[str, int] = {}
        for residue in self.residues:
            for part in residue.slices:
                sizes[part.name] = max(sizes.get(part.name, 0), part.start + part.length)
        totals = {name: torch.zeros(numel, device=self.device) for name, numel in sizes.items()}
        for rank in range(saved_world_size) if totals else ():
            saved = read(rank)
            weights = {key.partition("/")[2]: float(value) for key, value in saved.items() if _is_weight(key)}
            for key, values in saved.items():
                kind, name, start = parse_key(key)
                if name in totals and kind in weights:
                    wanted = totals[name][start : start + values.numel()]
                    wanted += values[: wanted.numel()].to(wanted.device) * weights[kind]
        return totals

    def _share_out(self, totals: dict[str, Tensor]) -> None:
        """Take this rank's part of what was added up."""
        for residue in self.residues:
            residue.feedback.kept.zero_()
            for part in residue.slices:
                total = totals[part.name][part.start : part.start + part.length]
                residue.feedback.kept[part.offset : part.offset + part.length] = total * (
                    residue.share / residue.weight
                )


def _is_weight(key: str) -> bool:
    return key.startswith(f"{_WEIGHT}/")

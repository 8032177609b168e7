"""torch's PowerSGD, made safe: Vogels et al., arXiv:1905.13727; torch.distributed.algorithms.ddp_comm_hooks.

What torch's state lacks, and is added around its hook: errors in units of the true gradient, kept only if the step was
applied; factors that a non-finite step cannot poison, and that a parameter without gradient does not leave at zero for
good; a state that can be saved. And an order: torch starts a second collective inside a future's callback, which gloo
runs in another order on each rank, so on CPUs a thread takes one tensor after the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from launcher.compression.feedback import Feedback
from launcher.compression.layout import Layout
from launcher.compression.links import Team
from launcher.compression.terms import StepTerms
from launcher.compression.wire import Residue, Wire
from launcher.config.schema import CompressionConfig

__all__ = ["PowerSGD"]

_EPSILON = 1e-16
"""Divides by the norm of a column that may be zero."""
_NOISE = 1e-12
"""Of a factor's zeros, which would stay zero for ever."""
_Future: Any = torch.futures.Future


class _Bucket:
    """What torch's hook asks of a bucket; it is never the last, so that the iterations are counted here."""

    def __init__(self, index: int, flat: Tensor, gradients: Sequence[Tensor]) -> None:
        self._index = index
        self._flat = flat
        self._gradients = [each.view(1) if each.ndim == 0 else each for each in gradients if each.numel()]

    def index(self) -> int:
        return self._index

    def buffer(self) -> Tensor:
        return self._flat

    def gradients(self) -> list[Tensor]:
        return self._gradients

    def is_last(self) -> bool:
        return False


class PowerSGD:
    """Averages flat tensors over a team, each matrix in them by two thin ones.

    Args:
        team: of at least two ranks.
        config: ``rank``, ``start_step``, ``error_feedback``.
        wire: counts, and keeps the errors.
        axis: a name for the team's place in the whole.
    """

    def __init__(self, team: Team, config: CompressionConfig, wire: Wire, axis: str) -> None:
        self._team = team
        self._wire = wire
        self._axis = axis
        self._rank = config.rank
        self._state = PowerSGDState(
            process_group=team.group,
            matrix_approximation_rank=config.rank,
            start_powerSGD_iter=config.start_step,
            use_error_feedback=config.error_feedback,
            orthogonalization_epsilon=_EPSILON,
        )
        self._layouts: dict[int, Layout] = {}
        self._errors: dict[int, Feedback] = {}
        self._factors: dict[int, Feedback] = {}
        self._inputs: dict[int, Tensor] = {}
        """Of a step that measures, where torch keeps no errors."""
        self._numel_sent: dict[int, int] = {}
        self._unscaled = StepTerms(team.device)
        self._has_crossed = False
        self._thread: ThreadPoolExecutor | None = None
        wire.counters.append(team)
        wire.keeps_errors = True
        wire.keepers.append(self)

    def prepare(self, index: int, layout: Layout) -> None:
        """Get ready for a flat tensor before it first crosses, or for one whose layout has changed."""
        if self._layouts.get(index) == layout:
            return
        self._layouts[index] = layout
        self._factors.pop(index, None)
        self._state.p_memory_dict.pop(index, None)
        self._state.q_memory_dict.pop(index, None)
        if not self._state.use_error_feedback:
            return
        self._wire.forget([self._errors[index]] if index in self._errors else [])
        self._errors[index] = Feedback(layout.numel, self._team.device)
        part = 1.0 / self._team.size
        residue = Residue(f"{self._axis}.low_rank", self._errors[index], layout.slices, weight=part, share=part)
        self._wire.residues.append(residue)

    def submit(self, index: int, flat: Tensor, gradients: Sequence[Tensor], layout: Layout) -> Any:
        """Start to replace ``flat`` by the team's mean; returns a torch.futures.Future of it.

        Args:
            index: tells the tensor from others of a step.
            flat: (n,).
            gradients: its parts, as views in the shape of the parameters.
            layout: of ``flat``.
        """
        begun = self._begin(index, flat, gradients, layout)
        if flat.is_cuda:
            return begun().then(lambda future: self._finish(index, future.value()))
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="gradient-courier")
        future = _Future()

        def run() -> None:
            try:
                future.set_result(self._finish(index, begun().wait()))
            except BaseException as error:  # told to whoever waits for the future: backward
                future.set_exception(error)

        self._thread.submit(run)
        return future

    def run(self, index: int, flat: Tensor, gradients: Sequence[Tensor], layout: Layout) -> None:
        """``submit``, here and now."""
        self._finish(index, self._begin(index, flat, gradients, layout)().wait())

    def stay(self, index: int, names: frozenset[str]) -> None:
        """These parameters' last means are nobody's: their errors stay what they were."""
        for part in self._layouts[index].slices:
            if part.name in names and index in self._errors:
                self._errors[index].stay(part.offset, part.length)

    def _begin(self, index: int, flat: Tensor, gradients: Sequence[Tensor], layout: Layout) -> Callable[[], Any]:
        """Lay out what torch's hook will find; returns what calls it."""
        self.prepare(index, layout)
        self._has_crossed = True

        def call() -> Any:
            state = self._state
            if index in self._errors:
                state.error_dict[index] = self._errors[index].kept * self._wire.terms.loss_scale
            if index in self._factors:
                state.q_memory_dict[index] = self._factors[index].kept.clone()
                if index not in state.p_memory_dict:
                    state.p_memory_dict[index] = self._left_factors(gradients)
            if self._wire.terms.measures and not state.use_error_feedback:
                self._inputs[index] = flat.clone()
            before = state.total_numel_after_compression
            future = powerSGD_hook(state, _Bucket(index, flat, gradients))  # by duck typing
            self._numel_sent[index] = state.total_numel_after_compression - before
            return future

        return call

    def _left_factors(self, gradients: Sequence[Tensor]) -> Tensor:
        """Room for what torch computes anew in each step, where it was not itself that began."""
        from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import _should_compress

        numel = 0
        for each in gradients:
            rows, columns = (each.shape[0], each[0].numel()) if each.ndim and each.numel() else (1, 1)
            rank = min(rows, columns, self._rank)
            if _should_compress(rows, columns, rank, self._state.min_compression_rate)[0]:  # type: ignore[no-untyped-call]
                numel += rows * rank
        return torch.empty(numel, device=self._team.device)

    def _finish(self, index: int, mean: Tensor) -> Tensor:
        """Take the step's errors and factors aside until it is known whether it was applied."""
        state, terms = self._state, self._wire.terms
        begun = state.iter >= state.start_powerSGD_iter
        sent = self._numel_sent[index] if begun else mean.numel()
        self._team.bytes_sent += 2 * (self._team.size - 1) * sent * mean.element_size() // self._team.size
        if begun:
            factors = state.q_memory_dict[index]
            if index not in self._factors:
                self._factors[index] = Feedback(factors.numel(), factors.device)
                self._factors[index].kept.copy_(self._noise(index, factors.numel()))
            fresh = torch.where(factors == 0, self._noise(index, factors.numel()) * _NOISE, factors)
            self._factors[index].keep(fresh, 0, self._unscaled)
            if index in self._errors:
                lost = state.error_dict[index]
                if terms.measures:
                    terms.measure(mean + lost, lost)
                self._errors[index].keep(lost, 0, terms)
            elif index in self._inputs:
                terms.measure(self._inputs[index], self._inputs[index] - mean)
        self._inputs.pop(index, None)
        self._wire.crossed(mean)
        return mean

    def _noise(self, index: int, numel: int) -> Tensor:
        """The same on every rank."""
        return torch.randn(numel, generator=torch.Generator().manual_seed(index)).to(self._team.device)

    def settle(self, found_inf: Tensor) -> None:
        """The step was applied (0) or skipped (1); the errors are the wire's to settle."""
        self._state.iter += int(self._has_crossed)
        self._has_crossed = False
        for factors in self._factors.values():
            factors.settle(found_inf)

    def state_dict(self) -> dict[str, Tensor]:
        """The factors, by what they belong to, and the number of steps."""
        factors = {self._name(index): factors.kept for index, factors in self._factors.items()}
        return {f"{self._axis}.steps": torch.tensor(self._state.iter), **factors}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Factors of other tensors are left alone: those here begin at random, as they did there."""
        if f"{self._axis}.steps" in state:
            self._state.iter = int(state[f"{self._axis}.steps"])
        for index in self._layouts:
            saved = state.get(self._name(index))
            if saved is not None:
                self._factors[index] = Feedback(saved.numel(), self._team.device)
                self._factors[index].kept.copy_(saved)

    def names(self) -> set[str]:
        """Of the number of steps, and of the factors of all tensors."""
        return {f"{self._axis}.steps", *(self._name(index) for index in self._layouts)}

    def _name(self, index: int) -> str:
        """Of the factors of a tensor with this layout."""
        described = f"{self._layouts[index]} {self._rank}"
        return f"{self._axis}.factors/{hashlib.sha256(described.encode()).hexdigest()[:16]}"

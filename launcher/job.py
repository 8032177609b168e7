"""What a user writes: a :class:`Job` (model, data, loss) and the :class:`LossOutput` it returns.

Belongs here: the contract between a user's code and the engine, with its defaults.
Does not belong here: anything about ranks, devices, precision or files. Torch is imported
only inside the functions that need it, so that ``import launcher`` stays instant.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

__all__ = ["Job", "LossOutput"]


@dataclass(frozen=True)
class LossOutput:
    """What ``compute_loss`` returns: sums over the items of one micro-batch, not means.

    Sums add up exactly over micro-batches and ranks, however unevenly items fall; the engine
    divides once, by the number of items in the global batch.
    """

    loss: Tensor
    """Scalar, differentiable: the sum of the loss over the items."""
    items: int | Tensor
    """How many items (samples, tokens, …) ``loss`` sums over. A tensor on the model's device
    costs no synchronisation."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """Scalar sums over the same items, by name: the engine reports ``sum / items`` after validation.
    The names must be the same for every batch."""

    @classmethod
    def mean(
        cls,
        loss: Tensor,
        items: int | Tensor,
        metrics: Mapping[str, Tensor] | None = None,
    ) -> LossOutput:
        """From a mean over ``items`` (and means of metrics), as ``nn.CrossEntropyLoss`` returns it."""
        return cls(loss.float() * items, items, {name: value * items for name, value in (metrics or {}).items()})


class Job(ABC):
    """A learning problem: a model, its data and its loss. Everything else is T-minus' business.

    The same object serves training and validation, on every rank. Its constructor's arguments
    come from the configuration's ``job`` group.
    """

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The model, freshly initialised, in FP32, on torch's default device.

        Called under the run's seed, so that all ranks build the same weights.
        """

    @abstractmethod
    def build_dataset(self, split: str) -> Dataset[Any] | None:
        """The map-style dataset (``__len__`` and ``__getitem__``) of a split.

        ``split`` is ``"train"`` or ``"validation"``; None for validation means that there is none.
        """

    @abstractmethod
    def compute_loss(self, model: nn.Module, batch: Any) -> LossOutput:
        """Call ``model`` on ``batch`` (already on the model's device) and sum its loss.

        Runs under autocast. Call the ``model`` that is passed in, not one that was kept: it is
        the wrapped one, whose gradients cross the wire.
        """

    def collate(self, samples: Sequence[Any]) -> Any:
        """One micro-batch from a list of samples: torch's ``default_collate``."""
        from torch.utils.data import default_collate

        return default_collate(list(samples))

    def parameter_groups(self, model: nn.Module) -> Iterable[Any]:
        """What the optimizer is given: parameters, or torch's dicts of ``params`` and options.

        The default is every parameter that requires a gradient, in one group.
        """
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """The repeated parts of the model, in the order of the forward pass.

        Sharding and activation checkpointing wrap each of them. The default finds the
        children of every ``nn.ModuleList``.
        """
        from torch import nn

        return [child for module in model.modules() if isinstance(module, nn.ModuleList) for child in module]

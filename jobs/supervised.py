"""Any model, dataset and criterion that YAML can name: ``criterion(model(*inputs), target)``.

Belongs here: the job, and metrics that YAML can name. Does not belong here: models and datasets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_method, instantiate
from torch import Tensor, nn
from torch.utils.data import Dataset

from launcher import Job, LossOutput
from launcher.errors import JobError

__all__ = ["SupervisedJob", "num_correct"]

_CROSS_ENTROPY = {"_target_": "torch.nn.CrossEntropyLoss"}


class SupervisedJob(Job):
    """Supervised learning from parts, each a mapping with ``_target_``; an item is a sample.

    The parts are built here, not by whoever builds the job (``_recursive_: false``), so that the model
    is initialised under the run's seed.

    A sample is a tuple ``(input, …, target)``, for ``model(input, …)``, or a dict with ``target_key``,
    for ``model(**rest)``. The target is one tensor, the model's output another. The criterion sees the
    output in FP32, with autocast off.

    What the criterion returns is read by its shape and its ``reduction``: a tensor with dimensions is
    summed, a scalar of ``reduction="sum"`` is the sum already, any other scalar is the mean over the
    samples. A mean over something else (``ignore_index``, class weights) is only approximately right:
    its weight in the global batch is still its number of samples.

    Args:
        model: The model.
        train_dataset: A map-style dataset.
        validation_dataset: Another one; None for no validation.
        criterion: A callable of (output, target); None stands for ``torch.nn.CrossEntropyLoss``.
        metrics: By name, the dotted path of a function of (output, target) that returns a scalar sum
            over the samples, such as :func:`num_correct`.
        target_key: Where the target is in a dict.

    Raises:
        JobError: A part cannot be built, or the parts do not fit together.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        train_dataset: Mapping[str, Any],
        validation_dataset: Mapping[str, Any] | None = None,
        criterion: Mapping[str, Any] | None = None,
        metrics: Mapping[str, str] | None = None,
        target_key: str = "target",
    ) -> None:
        self.model = model
        self.datasets = {"train": train_dataset, "validation": validation_dataset}
        self.criterion = _build("criterion", _CROSS_ENTROPY if criterion is None else criterion)
        self.metrics = {name: _find_function(name, path) for name, path in (metrics or {}).items()}
        self.target_key = target_key
        if not callable(self.criterion):
            raise JobError(f"job.criterion is {_name(self.criterion)}, which cannot be called with (output, target).")
        if isinstance(self.criterion, nn.Module) and any(True for _ in self.criterion.parameters()):
            raise JobError(
                f"job.criterion, {_name(self.criterion)}, has parameters, which no optimizer would train. "
                "Make them part of the model."
            )

    def build_model(self) -> nn.Module:
        """Whatever ``model`` describes."""
        model = _build("model", self.model)
        if not isinstance(model, nn.Module):
            raise JobError(f"job.model is {_name(model)}; it must be a torch.nn.Module.")
        return model

    def build_dataset(self, split: str) -> Dataset[Any] | None:
        """Whatever ``train_dataset`` or ``validation_dataset`` describes."""
        if split not in self.datasets:
            raise JobError(f"There is no split {split!r}. Use one of: {', '.join(self.datasets)}.")
        description = self.datasets[split]
        if description is None:
            return None
        dataset: Dataset[Any] = _build(f"{split}_dataset", description)
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise JobError(f"job.{split}_dataset is {_name(dataset)}; it must have __len__ and __getitem__.")
        return dataset

    def compute_loss(self, model: nn.Module, batch: Any) -> LossOutput:
        """The criterion's sum over the samples, and each metric's."""
        inputs, named_inputs, target = self._split(batch)
        output = model(*inputs, **named_inputs)
        if not isinstance(output, Tensor):
            raise JobError(
                f"The model returned {_name(output)}; SupervisedJob wants one tensor. Write a Job of your own."
            )
        with torch.autocast(output.device.type, enabled=False):
            output = output.float()
            loss = self._criterion_on(output.device)(output, target)
            metrics = {name: function(output.detach(), target) for name, function in self.metrics.items()}
        if not isinstance(loss, Tensor):
            raise JobError(f"job.criterion returned {_name(loss)}; it must return a tensor.")
        num_samples = len(target)
        if loss.ndim > 0:
            return LossOutput(loss.sum(), num_samples, metrics)
        if getattr(self.criterion, "reduction", "mean") == "sum":
            return LossOutput(loss, num_samples, metrics)
        return LossOutput(loss * num_samples, num_samples, metrics)

    def _split(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
        """Positional inputs, named inputs and the target of a batch."""
        inputs: tuple[Any, ...] = ()
        named_inputs: dict[str, Any] = {}
        if isinstance(batch, Mapping):
            if self.target_key not in batch:
                raise JobError(f"A sample has no {self.target_key!r}, only {list(batch)}. Set job.target_key to one.")
            named_inputs = {name: value for name, value in batch.items() if name != self.target_key}
            target = batch[self.target_key]
        elif isinstance(batch, (tuple, list)) and len(batch) >= 2:
            *first, target = batch
            inputs = tuple(first)
        else:
            raise JobError(
                f"The dataset's samples make a batch that is {_name(batch)}. "
                f"A sample must be a tuple (input, …, target), or a dict with the key {self.target_key!r}."
            )
        if not isinstance(target, Tensor) or target.ndim == 0:
            raise JobError(f"The target is {_name(target)}; SupervisedJob wants one tensor. Write a Job of your own.")
        return inputs, named_inputs, target

    def _criterion_on(self, device: torch.device) -> Callable[[Tensor, Tensor], Any]:
        """The criterion, with its buffers (class weights) beside the output."""
        if isinstance(self.criterion, nn.Module):
            self.criterion.to(device)
        criterion: Callable[[Tensor, Tensor], Any] = self.criterion
        return criterion


def num_correct(output: Tensor, target: Tensor) -> Tensor:
    """How many samples have their largest output (N, C) at the target's class id (N,). As a metric: accuracy."""
    if output.ndim != 2 or target.ndim != 1:
        raise JobError(
            f"num_correct wants an output (N, C) and class ids (N,), not {tuple(output.shape)} and "
            f"{tuple(target.shape)}. Remove it from job.metrics, or name a function of your own."
        )
    return (output.argmax(dim=1) == target).sum()


def _build(part: str, description: Any) -> Any:
    """The object that ``description`` stands for, its lists and dicts being Python's own."""
    if not isinstance(description, Mapping) or "_target_" not in description:
        raise JobError(f"job.{part} is {description!r}; it must be a mapping with _target_, say {_CROSS_ENTROPY}.")
    try:
        return instantiate(description, _convert_="all")
    except InstantiationException as error:
        raise JobError(f"job.{part} cannot be built. {error}") from error


def _find_function(name: str, path: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The function at a dotted path."""
    try:
        function: Callable[[Tensor, Tensor], Tensor] = get_method(path)
    except (ImportError, ValueError) as error:
        raise JobError(f"job.metrics.{name} is {path!r}, which is no function: {error}") from error
    return function


def _name(value: Any) -> str:
    """The kind of a value, for a message."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"

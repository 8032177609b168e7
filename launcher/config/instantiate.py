"""From the configuration's ``_target_`` nodes to objects: the workers' only use of Hydra."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from hydra.utils import get_object, instantiate

from launcher.errors import ConfigurationError, JobError
from launcher.job import Job

if TYPE_CHECKING:
    import torch

__all__ = ["build_job", "build_optimizer", "optimizer_factory"]


def build_job(node: Mapping[str, Any]) -> Job:
    """The user's job; its arguments are plain lists and dicts.

    Raises:
        JobError: what was made is not a Job.
    """
    job = instantiate(dict(node), _convert_="all")
    if not isinstance(job, Job):
        raise JobError(f"job._target_={node['_target_']!r} made a {type(job).__name__}, not a launcher.Job.")
    return job


def optimizer_factory(node: Mapping[str, Any]) -> Callable[..., Any]:
    """What the configuration's optimizer is made by: as a rule its class."""
    factory: Callable[..., Any] = get_object(str(node["_target_"]))
    return factory


def build_optimizer(node: Mapping[str, Any], parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """The configured optimizer, fused where it can be and nothing else was asked for.

    Raises:
        ConfigurationError: the optimizer refuses its arguments.
    """
    arguments = dict(node)
    factory = optimizer_factory(node)
    named = inspect.signature(factory).parameters
    if "fused" in named and not arguments.keys() & {"fused", "foreach", "differentiable", "capturable"}:
        arguments["fused"] = True
    # The parameters do not go through Hydra: it would copy them.
    make = instantiate(arguments, _partial_=True, _convert_="all")
    try:
        return make(parameters)  # type: ignore[no-any-return]  # Hydra is untyped
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"optimizer: {node['_target_']} refuses its arguments: {error}") from error

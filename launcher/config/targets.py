"""What ``_target_`` names: does it import, is it what it should be, does it take these arguments?

Checked in the launching process, so that a wrong name costs two seconds and not a job in a queue.
This module imports the user's code, and with it torch.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hydra.utils import get_object

from launcher.config.nearest import nearest
from launcher.config.schema import RunConfig
from launcher.errors import ConfigurationError, JobError
from launcher.job import Job

__all__ = ["check_targets"]

_HYDRA_KEYS = frozenset({"_target_", "_args_", "_recursive_", "_convert_", "_partial_"})


def check_targets(config: RunConfig) -> None:
    """Import and check the job, the optimizer, and whatever their arguments name.

    Raises:
        ConfigurationError: a name does not import, or an argument does not exist or is missing.
        JobError: the job's class lacks a method.
    """
    job = _resolve("job", config.job)
    _check_job(str(config.job["_target_"]), job)
    _check_arguments("job", config.job, job, given=())
    for key, node in _nested_targets("job", config.job):
        _check_arguments(key, node, _resolve(key, node), given=None)
    optimizer = _resolve("optimizer", config.optimizer)
    _check_optimizer(str(config.optimizer["_target_"]), optimizer)
    _check_arguments("optimizer", config.optimizer, optimizer, given=("params",))


def _nested_targets(prefix: str, node: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(node, Mapping):
        items = node.items()
    elif isinstance(node, (list, tuple)):
        items = enumerate(node)
    for name, value in items:
        key = f"{prefix}.{name}"
        if isinstance(value, Mapping) and "_target_" in value:
            yield key, value
        yield from _nested_targets(key, value)


def _resolve(key: str, node: Mapping[str, Any]) -> Any:
    target = node["_target_"]
    if not isinstance(target, str) or not target:
        raise ConfigurationError(f"{key}._target_={target!r} is not a dotted name such as my_module.MyClass.")
    try:
        return get_object(target)
    except Exception as error:  # a user's module may raise anything while it is imported
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        module, _, name = target.rpartition(".")
        if module in sys.modules and not hasattr(sys.modules[module], name):
            detail = f"the module {module} has no {name!r}.{nearest(name, vars(sys.modules[module]))}".rstrip(".")
        else:
            detail = f"{type(cause).__name__}: {cause}{_line_of(cause)}".strip()
        raise ConfigurationError(
            f"{key}._target_={target!r} cannot be imported ({detail}). It must be module.Name, the module in "
            "the current folder or installed in this environment."
        ) from error
    except SystemExit as error:
        raise ConfigurationError(f"{key}._target_={target!r} cannot be imported: it calls sys.exit.") from error


def _line_of(error: BaseException) -> str:
    """Where the user's own module failed, when it did and Python knows."""
    frames = inspect.getinnerframes(error.__traceback__) if error.__traceback__ else []
    outside = [frame for frame in frames if "importlib" not in frame.filename and "hydra" not in frame.filename]
    if isinstance(error, SyntaxError) or not outside or outside[-1].filename == __file__:
        return ""
    return f", at {outside[-1].filename}:{outside[-1].lineno}"


def _check_job(target: str, job: Any) -> None:
    if not callable(job):
        raise JobError(f"job._target_={target!r} is not a class: it must name a subclass of launcher.Job.")
    if not inspect.isclass(job):
        return  # a function that returns a Job; its result is checked in the worker
    if not issubclass(job, Job):
        raise JobError(f"job._target_={target!r} is not a subclass of launcher.Job: write class {job.__name__}(Job).")
    missing = sorted(job.__abstractmethods__)
    if missing:
        methods = ", ".join(f"{name}{inspect.signature(getattr(Job, name))}" for name in missing)
        raise JobError(f"job._target_={target!r} lacks the method(s) {methods}: add them to class {job.__name__}.")


def _check_optimizer(target: str, optimizer: Any) -> None:
    import torch

    if inspect.isclass(optimizer) and not issubclass(optimizer, torch.optim.Optimizer):
        raise ConfigurationError(f"optimizer._target_={target!r} is not a torch.optim.Optimizer.")
    if inspect.isclass(optimizer) and issubclass(optimizer, torch.optim.Optimizer):
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise ConfigurationError(
                f"optimizer._target_={target!r} computes the loss several times in a step (its step needs a closure), "
                "and T-minus computes it once: name another optimizer."
            )
    if not callable(optimizer):
        raise ConfigurationError(f"optimizer._target_={target!r} cannot be called: name a torch.optim.Optimizer.")


def _check_arguments(key: str, node: Mapping[str, Any], target: Any, given: tuple[str, ...] | None) -> None:
    """Refuse arguments that ``target`` does not take; with ``given``, also ones that it misses."""
    if not callable(target):
        return
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # builtins without a signature
        return
    named = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    arguments = [str(name) for name in node if name not in _HYDRA_KEYS]
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for name in arguments:
            if name not in named:
                valid = ", ".join(sorted(set(named) - set(given or ()))) or "none"
                raise ConfigurationError(
                    f"{key}.{name}: {node['_target_']} has no argument {name!r}.{nearest(name, named)} Valid: {valid}."
                )
    if given is not None and "_args_" not in node and not node.get("_partial_"):
        required = [name for name, parameter in named.items() if parameter.default is parameter.empty]
        missing = [name for name in required if name not in (*arguments, *given)]
        if missing:
            raise ConfigurationError(
                f"{key}: {node['_target_']} needs the argument(s) {', '.join(missing)}: set {key}.{missing[0]}."
            )

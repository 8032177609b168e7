"""From a command line to RunConfigs: Hydra, with a project's own folder first and its errors in plain words.

Hydra runs here, in the launching process, and nowhere else: workers load ``config.yaml``.
"""

from __future__ import annotations

import importlib.resources
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import yaml
from hydra import main as hydra_main
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launcher.config.nearest import nearest
from launcher.config.resumed import PRIMARY, store_resumed
from launcher.config.schema import RunConfig
from launcher.config.words import in_words
from launcher.errors import ConfigurationError, RequestError

__all__ = ["compose", "experiments"]

_SHIPPED = "pkg://launcher.conf"
_SWEEP_LAUNCHER = "hydra_plugins.tminus.SweepLauncher"
"""The ``_target_`` in conf/hydra/launcher/tminus.yaml."""


def compose(
    argv: Sequence[str],
    prepare: Callable[[RunConfig], list[str]],
    command: Callable[[RunConfig, list[str]], float | None],
    beginning: RunConfig | None = None,
    together: Together | None = None,
) -> None:
    """Let Hydra act on ``argv``: show something and exit, or run ``command`` on each composed run.

    Args:
        argv: the command line without the program's name.
        prepare: fills in and checks a configuration, returns warnings; in a sweep it sees every run before
            the first starts.
        command: does the work, given the warnings; its result is what a sweeper optimises.
        beginning: what the command line changes, in place of the shipped defaults: a run's configuration. A group
            that is chosen anew (``parallel=fsdp``) replaces the run's own as a whole.
        together: does what ``command`` does for all runs of a sweep at once; None: it does not want them (all of them
            are then done one after the other).

    Raises:
        ConfigurationError: the configuration does not compose, or is wrong.
        SystemExit: Hydra has answered (--help, --cfg, completion).
    """
    task = _Task(prepare, command, together)
    ConfigStore.instance().store(name="tminus_schema", node=RunConfig)
    _register_plugins(_project_folders(argv))
    primary = "launch"
    if beginning is not None:
        places = [*_project_folders(argv), importlib.resources.files("launcher.conf")]
        primary, argv = PRIMARY, store_resumed(beginning, argv, places)
    logging.getLogger("hydra").setLevel(logging.CRITICAL)  # what it logs it also raises, and that is put in words here
    decorated = hydra_main(version_base="1.3", config_path=_SHIPPED, config_name=primary)(task)
    with _hydra_environment(argv):
        try:
            decorated()
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError) as error:
            raise error if isinstance(error, RequestError) else _explained(error) from error
    if task.failure is not None:
        raise task.failure


Together = Callable[[Sequence[tuple[RunConfig, list[str]]]], "Sequence[float | None] | None"]
"""All of a sweep's configurations with their warnings, to each one's result; None: these are for ``command``."""


class _Task:
    """What Hydra calls for each run. It keeps an exception to itself: Hydra would print it its own way."""

    def __init__(
        self,
        prepare: Callable[[RunConfig], list[str]],
        command: Callable[[RunConfig, list[str]], float | None],
        together: Together | None = None,
    ) -> None:
        self.together = together
        self._prepare = prepare
        self._command = command
        self.failure: Exception | None = None

    def prepared(self, composed: DictConfig) -> tuple[RunConfig, list[str]]:
        try:
            config = _to_run_config(composed)
        except OmegaConfBaseException as error:
            raise _explained(error) from error
        return config, self._prepare(config)

    def __call__(self, composed: DictConfig) -> float | None:
        if self.failure is not None:
            return None
        try:
            return self._command(*self.prepared(composed))
        except Exception as error:
            self.failure = error
            return None


class SweepLauncher(BasicLauncher):
    """One run after the other, once all of them are known to be right."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        assert isinstance(self.task_function, _Task)
        assert self.hydra_context is not None
        assert self.config is not None
        prepared = []
        for overrides in job_overrides:
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            try:
                prepared.append(self.task_function.prepared(composed))
            except RequestError as error:
                chosen = " ".join(item for item in overrides if not item.startswith("hydra."))
                raise type(error)(f"In the sweep's run {chosen}:\n{error}") from error
        together = self.task_function.together
        values = together(prepared) if together is not None else None
        if values is not None:
            return [
                JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED, _return_value=value)
                for overrides, value in zip(job_overrides, values, strict=True)
            ]
        results: Sequence[JobReturn] = super().launch(job_overrides, initial_job_idx)
        return results


def experiments(argv: Sequence[str] = ()) -> list[tuple[str, str]]:
    """The experiments that can be chosen here, a project's own first: (name, first comment line)."""
    shipped = importlib.resources.files("launcher.conf") / "experiment"
    folders: list[Any] = [folder / "experiment" for folder in _project_folders(argv)]
    found: dict[str, str] = {}
    for folder in [*folders, shipped]:
        if not folder.is_dir():
            continue
        for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
            if file.name.endswith(".yaml"):
                found.setdefault(file.name.removesuffix(".yaml"), _first_comment(file.read_text(encoding="utf-8")))
    return list(found.items())


def _first_comment(text: str) -> str:
    lines = (line for line in text.splitlines() if line.startswith("#") and "@package" not in line)
    return next(lines, "#").lstrip("# ").rstrip()


def _to_run_config(composed: DictConfig) -> RunConfig:
    # Hydra's own node has mandatory values that it fills in only when a run starts.
    own = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    values = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), values))
    assert isinstance(config, RunConfig)
    return config


def _project_folders(argv: Sequence[str]) -> list[Path]:
    """Where a project keeps its own configurations: --config-dir, then ./conf."""
    folders = []
    for index, argument in enumerate(argv):
        flag, _, value = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            value = value or (argv[index + 1] if index + 1 < len(argv) else "")
            folders.append(Path(value).absolute())
    own = Path.cwd() / "conf"
    return [folder for folder in [*folders, own] if folder.is_dir()]


class _ProjectSearchPath(SearchPathPlugin):
    """Puts a project's folders before the configurations that T-minus ships."""

    folders: ClassVar[Sequence[Path]] = ()
    """Of the command line that is being composed: Hydra makes the object itself, and keeps the class for good."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in self.folders:  # each goes right before what T-minus ships, after the one before it
            search_path.prepend("project", f"file://{folder}", anchor=SearchPathQuery(provider="main"))


def _register_plugins(folders: Sequence[Path]) -> None:
    _ProjectSearchPath.folders = folders
    plugins = Plugins.instance()
    plugins.register(_ProjectSearchPath)
    plugins.register(SweepLauncher)
    # Hydra instantiates launchers of this namespace alone, but imports the class by its real name.
    plugins.class_name_to_class[_SWEEP_LAUNCHER] = SweepLauncher


@contextmanager
def _hydra_environment(argv: Sequence[str]) -> Iterator[None]:
    """Give Hydra its command line, and have it raise errors instead of printing them."""
    before_argv, before_full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [before_argv[0], *argv]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = before_argv
        if before_full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before_full


def _first_reason(message: str) -> str:
    """Of what Hydra's parser says, the line that says something."""
    if message.startswith("LexerNoViableAltException"):
        return "it has characters that a plain value must not have"
    lines = [line.strip() for line in message.splitlines()]
    return next(
        (line for line in lines if line and not line.startswith(("Error parsing", "See "))), "it cannot be read"
    )


def _quoted(override: str) -> str:
    """How to write a value that Hydra's grammar would not take as it is."""
    key, equals, value = override.partition("=")
    if not equals or set(value) & set("\"'[]{}\\"):
        return ""
    quoted = shlex.quote(f'{key}="{value}"')
    return f" A value with other characters than Hydra's goes in quotes: {quoted}."


def _explained(error: Exception) -> ConfigurationError:
    """Hydra's and OmegaConf's exceptions as one message that names the value and what to do."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        valid = ", ".join(error.options)
        return ConfigurationError(f"{group}={option} does not exist.{nearest(option, error.options)} Valid: {valid}.")
    if isinstance(error, OverrideParseException):
        return ConfigurationError(
            f"{error.override!r} is not an override ({_first_reason(error.message)}): write key=value, "
            f"+experiment=NAME, or a flag.{_quoted(str(error.override))}"
        )
    chain: list[BaseException] = [error]
    # Hydra raises some of its exceptions while it handles OmegaConf's, without naming that as the cause.
    while (following := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(following)
    for link in chain:
        if isinstance(link, OmegaConfBaseException) and not isinstance(link, HydraException):
            file = re.match(r"In '[^']+': ", str(error))
            return ConfigurationError(f"{file[0] if file else ''}{in_words(link)}")
    return ConfigurationError("\n".join(text for text in dict.fromkeys(map(in_words, chain)) if text))

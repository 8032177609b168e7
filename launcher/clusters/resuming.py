"""``launch resume RUN [overrides]``: from a run's own configuration to that of its next attempt."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from launcher.clusters.folders import move_to
from launcher.clusters.safety import TRUST, refuse_shared_run
from launcher.config.schema import ClusterConfig, RunConfig
from launcher.errors import RequestError
from launcher.rundir import RunDirectory, read_json
from launcher.rundir.find import find_run

__all__ = ["compose_resumed"]

_USAGE = "launch resume RUN [key=value …], where RUN is a path, an id, an unambiguous beginning of one, or latest"


def compose_resumed(
    words: Sequence[str],
    prepare: Callable[[RunConfig], list[str]],
    command: Callable[[RunConfig, list[str]], float | None],
) -> None:
    """What ``config.compose.compose`` does for a new run.

    Changes to the folder that the run was begun in: its job's module and its data are named relative to that.

    Args:
        words: what follows ``launch resume``.
        prepare: fills in and checks the configuration.
        command: goes on with the run in the configuration's ``run_dir``.

    Raises:
        RunError: no run is meant, or several; or another user could have written into it.
        ConfigurationError: the overrides do not fit.
    """
    if not words or words[0].startswith("-") or "=" in words[0]:
        raise RequestError(f"Which run? {_USAGE}.")
    name, *overrides = words
    if {"-m", "--multirun"} & set(overrides):
        raise RequestError(f"A sweep (-m) makes new runs: {_USAGE}.")
    roots = [word.removeprefix("runs_root=") for word in overrides if word.startswith("runs_root=")]
    if any(word.lstrip("+").startswith("run_dir=") for word in overrides):
        raise RequestError(f"run_dir cannot be changed: the run stays where it is. {_USAGE}.")
    run = find_run(name, Path(roots[-1] if roots else "runs"))
    # The run's own word on whether it is to be trusted does not count.
    refuse_shared_run(run, trusted=TRUST in map(str.lower, overrides))
    _go_where_it_began(run)
    from launcher.config.compose import compose
    from launcher.config.files import load_config

    beginning = load_config(run.configs()[-1])
    beginning.run_dir = str(run.path)
    beginning.checkpoint.trust_shared_directory = False
    if beginning.cluster.kind == "torchrun":
        beginning.cluster = ClusterConfig(max_restarts=beginning.cluster.max_restarts)
    compose(overrides, prepare, command, beginning)


def _go_where_it_began(run: RunDirectory) -> None:
    try:
        folder = Path(read_json(run.provenance)["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    if not folder.is_dir():
        print(f"warning: the run was begun in {folder}, which is gone; going on from here", file=sys.stderr)
    elif folder != Path.cwd():
        print(f"in {folder}, where the run was begun", flush=True)
        move_to(folder)

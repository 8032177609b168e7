"""The ``launch`` command: who asks for what, and the exit code.

Nothing heavy is imported before it is known to be needed: ``launch --version`` and an unknown verb need no
Hydra, ``launch --help`` and an unknown run no torch.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from launcher import __version__
from launcher.environment import is_torchrun_worker
from launcher.errors import EXIT_FINISHED, EXIT_REQUEST, EXIT_RESUMABLE, RequestError
from launcher.verbs import act, is_word

if TYPE_CHECKING:
    from launcher.config.schema import RunConfig

__all__ = ["main"]

_RESUME = "resume"
_INTERRUPTED = "launch: interrupted before training began"


def main(argv: Sequence[str] | None = None) -> int:
    """Act on a command line (without the program's name); returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # A console script does not have the current folder on its path; a project's modules are there.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return _act(arguments)
    except RequestError as error:
        print(f"launch: {error}", file=sys.stderr)
        return EXIT_REQUEST
    except KeyboardInterrupt:
        print(_INTERRUPTED, file=sys.stderr)
        return EXIT_RESUMABLE


def _act(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        print(f"launch {__version__}")
        return EXIT_FINISHED
    if is_torchrun_worker(os.environ):
        from launcher.clusters.torchrun import join

        return join(arguments)
    if not arguments:
        print(_what_to_type(), file=sys.stderr)
        return EXIT_REQUEST
    if is_word(arguments[0]) and arguments[0] != _RESUME:
        return act(arguments)
    return _train_here(arguments)


def _train_here(arguments: list[str]) -> int:
    """One run, new or resumed, or a sweep of several: the worst of their exit codes. A stopped run ends the sweep."""
    from launcher.clusters.agent import StopForwarder

    resumes = arguments[0] == _RESUME
    codes: list[int] = []
    forwarder = StopForwarder()

    def command(config: RunConfig, warnings: list[str]) -> float | None:
        from launcher.clusters.local import launch
        from launcher.rundir.records import read_json

        if forwarder.requested or EXIT_RESUMABLE in codes:
            if not codes:
                print(_INTERRUPTED, file=sys.stderr)
            codes.append(EXIT_RESUMABLE)
            return None
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        code, run = launch(config, ["launch", *arguments], forwarder, job_may_change=resumes)
        codes.append(code)
        if code != EXIT_FINISHED:
            return math.nan
        result = read_json(run.result)
        return float((result["validation"] or result)["loss"])

    with forwarder.listening():
        if resumes:
            from launcher.clusters.resuming import compose_resumed

            compose_resumed(arguments[1:], _prepare, command)
        else:
            from launcher.config.compose import compose

            compose(arguments, _prepare, command)
    return max(codes, default=EXIT_FINISHED)


def _prepare(config: RunConfig) -> list[str]:
    from launcher.config.prepare import prepare

    return prepare(config)


def _what_to_type() -> str:
    from launcher.config.compose import experiments

    lines = [f"  {name:<16} {about}" for name, about in experiments()]
    return "\n".join(
        [
            "launch: name an experiment: launch +experiment=NAME [key=value …]",
            "",
            "Experiments here:",
            *lines,
            "",
            "See what would run: launch +experiment=NAME --cfg job. All flags: launch --help.",
        ]
    )

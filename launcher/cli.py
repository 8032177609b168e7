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
    from launcher.rundir import RunDirectory

__all__ = ["main"]

_RESUME = "resume"
_INTERRUPTED = "launch: interrupted before training began"
_CHECK = "check"


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

        return join(arguments, resumes=arguments[:1] == [_RESUME])
    if not arguments:
        print(_what_to_type(), file=sys.stderr)
        return EXIT_REQUEST
    if arguments[0] == _CHECK:
        return _check(arguments[1:])
    if is_word(arguments[0]) and arguments[0] != _RESUME:
        return _look_or_act(arguments)
    return _train_here(arguments)


def _look_or_act(arguments: list[str]) -> int:
    """A verb; whoever reads what it prints may have seen enough before its end, such as ``head``."""
    try:
        code = act(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it ends
        return EXIT_FINISHED
    return code


def _train_here(arguments: list[str]) -> int:
    """One run, new or resumed, or a sweep of several: the worst of their exit codes. A stopped run ends the sweep."""
    from launcher.clusters.agent import StopForwarder

    resumes = arguments[0] == _RESUME
    codes: list[int] = []
    forwarder = StopForwarder()

    def command(config: RunConfig, warnings: list[str]) -> float | None:
        if forwarder.requested or EXIT_RESUMABLE in codes:
            if not codes:
                print(_INTERRUPTED, file=sys.stderr)
            codes.append(EXIT_RESUMABLE)
            return None
        _warn(warnings)
        if config.cluster.kind == "slurm":
            from launcher.clusters.slurm.submitting import submit

            run = submit(config, ["launch", *arguments], job_may_change=resumes)
            return _followed([run], codes)[0] if config.cluster.wait else None
        from launcher.clusters.local import launch

        code, run = launch(config, ["launch", *arguments], forwarder, job_may_change=resumes)
        codes.append(code)
        return _loss(run) if code == EXIT_FINISHED else math.nan

    def together(runs: Sequence[tuple[RunConfig, list[str]]]) -> Sequence[float | None] | None:
        if {config.cluster.kind for config, _ in runs} != {"slurm"}:
            return None
        from launcher.clusters.slurm.submitting import submit_sweep

        _warn(list(dict.fromkeys(warning for _, warnings in runs for warning in warnings)))
        made = submit_sweep([config for config, _ in runs], ["launch", *arguments])
        return _followed(made, codes) if runs[0][0].cluster.wait else [None] * len(made)

    with forwarder.listening():
        if resumes:
            from launcher.clusters.resuming import compose_resumed

            compose_resumed(arguments[1:], _prepare, command)
        else:
            from launcher.config.compose import compose

            compose(arguments, _prepare, command, together=together)
    return max(codes, default=EXIT_FINISHED)


def _check(arguments: list[str]) -> int:
    """``launch check``: everything that is looked at before a launch, and what would be sent to SLURM."""
    codes: list[int] = []

    def command(config: RunConfig, warnings: list[str]) -> None:
        _warn(warnings)
        if config.cluster.kind == "slurm":
            from launcher.clusters.slurm.checking import check

            codes.append(check(config))
        else:
            from launcher.config.sizes import world_size

            print(f"right: {world_size(config)} worker(s) on {config.device.value}; nothing was started")

    from launcher.config.compose import compose

    compose(arguments, _prepare, command)
    return max(codes, default=EXIT_FINISHED)


def _warn(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _followed(runs: Sequence[RunDirectory], codes: list[int]) -> list[float]:
    """Wait for submitted runs; each one's loss."""
    from launcher.verbs.following import follow

    ended = [follow(run, with_logs=len(runs) == 1) for run in runs]
    codes.extend(ended)
    return [_loss(run) if code == EXIT_FINISHED else math.nan for run, code in zip(runs, ended, strict=True)]


def _loss(run: RunDirectory) -> float:
    from launcher.rundir.records import read_json

    result = read_json(run.result)
    return float((result["validation"] or result)["loss"])


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

"""The shell that comes before the workers in a batch file, and says which line of it has failed."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterable, Iterator, Mapping

from launcher.clusters.slurm.joblog import NOT_STARTED
from launcher.config.schema import RunConfig
from launcher.errors import RequestError

__all__ = ["setup_lines"]

_SAY_WHICH = (
    f"""trap 'tminus_code=$?; [ -z "$tminus_line" ] || echo "{NOT_STARTED}its setup """
    """(cluster.modules, cluster.setup) has ended with exit code $tminus_code at: $tminus_line" >&2' EXIT"""
)
"""A trap, as a line may end the shell itself."""


def setup_lines(config: RunConfig, environment: Mapping[str, str]) -> list[str]:
    """Lines of shell that come before srun; a module or a line of ``cluster.setup`` that fails ends the job.

    Args:
        config: says which.
        environment: of the command that submits, for variables that are to be as they are there.

    Raises:
        RequestError: such a variable is not set.
    """
    lines = []
    for name, value in config.cluster.environment.items():
        given = environment.get(name) if value is None else value
        if given is None:
            raise RequestError(
                f"cluster.environment.{name}=null stands for its value here, but {name} is not set: set it, or "
                "give a value."
            )
        text = str(given).lower() if isinstance(given, bool) else str(given)
        lines.append(f"export {name}={shlex.quote(text)}")
    loads = [f"module load {shlex.quote(module)}" for module in config.cluster.modules]
    checked = [*_checked(loads), *_checked(config.cluster.setup)]
    return [*lines, *([_SAY_WHICH, *checked, "tminus_line="] if checked else [])]


def _checked(lines: Iterable[str]) -> Iterator[str]:
    """Each command, whole, with what ends the job if it fails: a command may be spread over several lines."""
    part: list[str] = []
    for line in lines:
        part.append(line)
        text = "\n".join(part)
        if text.endswith("\\") or not _is_whole(text):
            continue
        yield f"tminus_line={shlex.quote(part[0])}"
        yield from part
        yield "tminus_code=$?; [ $tminus_code -eq 0 ] || exit $tminus_code"
        part = []
    yield from part  # the shell says what is wrong with it


def _is_whole(text: str) -> bool:
    """Whether a shell would not wait for more."""
    read = subprocess.run(["bash", "-n", "-c", text], capture_output=True, text=True, check=False)
    return read.returncode == 0 and not read.stderr  # a here-document that is cut is a warning alone

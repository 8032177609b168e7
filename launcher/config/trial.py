"""Is the training data a stream that would have to be refused? Asked before anything starts.

What a job's dataset is, only building it can tell, and that may take minutes, or data that this machine has not. So it
is built here only where a class has been imported that would have to be refused, or the user's sources hint at one; by
a process of its own, as whatever it does (threads, memory, random numbers) does not belong into this one; and not for
longer than a while. What cannot be told here is left to the workers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

from launcher.config.hints import hints_at_stream
from launcher.config.schema import RunConfig
from launcher.config.sizes import world_size
from launcher.config.streams import stream_problem, streams_without_state
from launcher.environment import as_first_rank
from launcher.errors import JobError
from launcher.orphans import die_with_parent

__all__ = ["answer", "refuse_streams_without_state"]

_PATIENCE_SECONDS = 60.0


def refuse_streams_without_state(config: RunConfig) -> None:
    """With the job's module imported: see that it does not train on a stream that would have to be refused.

    Raises:
        JobError: it does.
    """
    if next(streams_without_state(), None) is None and not hints_at_stream(sys.modules.copy()):
        return
    try:
        asked = json.dumps(config.job)
    except (TypeError, ValueError):  # what YAML knows and JSON does not
        return
    problem = _ask(asked, world_size(config))
    if problem:
        raise JobError(problem)


@cache  # a sweep's runs often have the same job
def _ask(job: str, num_workers: int) -> str:
    """The problem, from a new process; empty if there is none, or if it cannot be told here."""
    command = [sys.executable, "-c", f"from {__name__} import answer; answer()"]
    request = json.dumps({"job": json.loads(job), "path": [*map(str, sys.path)], "parent": os.getpid()})
    try:
        answered = subprocess.run(
            command,
            input=request,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the workers say it again
            text=True,
            timeout=_PATIENCE_SECONDS,
            check=False,
            env=as_first_rank(os.environ, num_workers),
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answered.stdout if answered.returncode == 0 else ""


def answer() -> None:
    """In the new process: build the job and its training data, and write the problem to stdout."""
    request: dict[str, Any] = json.load(sys.stdin)
    die_with_parent(request["parent"])
    sys.path[:] = request["path"]
    stdout = os.dup(1)
    os.dup2(2, 1)  # the job may print
    from launcher.config.instantiate import build_job

    job = build_job(request["job"])
    problem = stream_problem(job, "train", job.build_dataset("train"))
    os.write(stdout, (problem or "").encode())
    os._exit(0)  # whatever the job has started

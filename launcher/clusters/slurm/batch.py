"""From a configuration to what sbatch is given: the only module that imports submitit, and its private names."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError, JobPaths
from submitit.slurm.slurm import SlurmExecutor

from launcher.clusters.slurm import queue
from launcher.clusters.slurm.aftermath import lines_after, lines_before
from launcher.clusters.slurm.setup import setup_lines
from launcher.config.schema import RunConfig
from launcher.config.sizes import node_range
from launcher.environment import outside_of_jobs
from launcher.errors import RequestError
from launcher.observe.terminal import say

__all__ = ["CODE", "Arguments", "UnknownOutcomeError", "batch_file", "sbatch", "test_only"]

CODE = "code"
"""The folder of the snapshot, in that of a submission."""
Arguments = tuple[str, int, str, str]
"""Of ``node.main``: run, attempt, submission, folder."""
_SLURM_EARLY_SECONDS = 60
"""sbatch(1): a signal may come that much earlier than asked for. ``watch.Deadline`` is exact; SLURM's is behind it."""
_NO_ANSWER = ("timed out", "zero bytes", "receive failure", "connection reset")
"""In sbatch's words when its request has gone out, and no answer has come: SLURM may act on it all the same."""
_NOT_REACHED = ("unable to contact", "connection refused", "communication")
"""The same where its request has not even gone out."""
_LOOK_SECONDS = 30.0
_LOOK_AGAIN_SECONDS = 1.0


class UnknownOutcomeError(RequestError):
    """Nobody can tell whether SLURM has taken the job: nothing of what was sent may be removed."""


def sbatch(config: RunConfig, folder: Path, workdir: Path, tasks: Sequence[Arguments]) -> list[str]:
    """Submit one job, or an array of several; returns the job's ids, in the order of ``tasks``.

    Args:
        config: says what is asked for.
        folder: where submitit keeps what it sends, and the tasks' own logs.
        workdir: where the tasks start: the code.
        tasks: for each run, what its nodes are told.

    Raises:
        RequestError: sbatch has refused; with its own words.
        UnknownOutcomeError: no answer has come to sbatch, and the queue does not show the job either.
    """
    from launcher.clusters.slurm.node import main

    with _outside_of_jobs():
        executor = _executor(config, folder, workdir, [Path(task[0]) for task in tasks])
        try:
            if len(tasks) == 1:
                return [executor.submit(main, *tasks[0]).job_id]
            with executor.batch():
                jobs = [executor.submit(main, *task) for task in tasks]
            return [job.job_id for job in jobs]
        except FileNotFoundError as error:
            if error.filename != "sbatch":
                raise
            raise RequestError("cluster=slurm: there is no sbatch here: submit from a login node.") from error
        except (FailedJobError, FailedSubmissionError) as error:
            words = _last_words(str(error))
            if _is_refusal(error):
                raise RequestError(f"sbatch has refused the job: {words}") from error
            return _found(folder, tasks, words)


def _is_refusal(error: FailedJobError | FailedSubmissionError) -> bool:
    """Whether sbatch has ended by itself, knowing that there is no job."""
    code = error.__cause__.returncode if isinstance(error.__cause__, subprocess.CalledProcessError) else 0
    return code > 0 and not any(words in str(error).lower() for words in _NO_ANSWER)


def _found(folder: Path, tasks: Sequence[Arguments], words: str) -> list[str]:
    """The ids of a job that sbatch has sent without hearing of it again, and the rest of what submitit does then.

    Raises:
        UnknownOutcomeError: it is not in the queue, or the queue cannot be seen.
    """
    say(f"sbatch has had no answer ({words}): looking for the job in the queue", error=True)
    deadline = time.monotonic() + _LOOK_SECONDS
    while True:
        try:
            scripts = queue.scripts_below(folder)
        except queue.QueueError as error:
            scripts, seen = {}, f"and the queue cannot be seen ({error})"
        else:
            seen = "and the queue does not show it yet"
        if scripts or time.monotonic() > deadline:
            break
        time.sleep(_LOOK_AGAIN_SECONDS)
    if not scripts:
        raise UnknownOutcomeError(f"sbatch has had no answer ({words}), {seen}")
    job_id, script = next(iter(scripts.items()))
    ids = [job_id] if len(tasks) == 1 else [f"{job_id}_{index}" for index in range(len(tasks))]
    pickles = {tuple(DelayedSubmission.load(path).args): path for path in folder.glob("*.pkl")}
    for name, task in zip(ids, tasks, strict=True):
        JobPaths(folder, job_id=name).move_temporary_file(pickles[tuple(task)], "submitted_pickle")
    JobPaths(folder, job_id=job_id).move_temporary_file(script, "submission_file", keep_as_symlink=True)
    return ids


def batch_file(config: RunConfig, run: Path, folder: Path, workdir: Path) -> str:
    """The exact text that sbatch would be given."""
    with _outside_of_jobs():
        executor = _executor(config, folder, workdir, [run])
        return executor._make_submission_file_text(executor._submitit_command_str, "")


def test_only(text: str) -> tuple[bool | None, str]:
    """Ask SLURM when such a job would start; whether it would at all (None: it does not answer), and its own words."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(text)
        file.flush()
        try:
            done = subprocess.run(
                ["sbatch", "--test-only", file.name],
                capture_output=True,
                text=True,
                check=False,
                env=outside_of_jobs(os.environ),
            )
        except FileNotFoundError:
            return False, "there is no sbatch here: try it on a login node"
    words = (done.stderr or done.stdout).replace("sbatch: ", "").strip()
    if done.returncode != 0 and any(said in words.lower() for said in (*_NO_ANSWER, *_NOT_REACHED)):
        return None, words
    return done.returncode == 0, words


def _executor(config: RunConfig, folder: Path, workdir: Path, runs: Sequence[Path]) -> SlurmExecutor:
    cluster = config.cluster
    try:
        executor = SlurmExecutor(folder, python=shlex.quote(cluster.python) if cluster.python is not None else None)
    except RuntimeError as error:
        raise RequestError(f"cluster=slurm: there is no srun here ({error}): submit from a login node.") from error
    executor.update_parameters(**_parameters(config, folder, workdir, runs))
    return executor


def _parameters(config: RunConfig, folder: Path, workdir: Path, runs: Sequence[Path]) -> dict[str, Any]:
    cluster, nodes = config.cluster, node_range(config)
    more: dict[str, Any] = {"requeue" if cluster.requeue else "no-requeue": True, "chdir": str(workdir)}
    more |= {
        str(name).lstrip("-").replace("_", "-"): value
        for name, value in cluster.sbatch.items()
        if value is not None and value is not False
    }
    if nodes.is_elastic:
        more["nodes"] = str(nodes)  # submitit itself counts with a number
    parameters: dict[str, Any] = {
        "job_name": config.name,
        "nodes": nodes.most,
        # Given a range, sbatch makes of this the number of tasks on the fewest nodes, and SLURM then gives no more.
        "ntasks_per_node": None if nodes.is_elastic else 1,
        "time": cluster.time_limit_min,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "gpus_per_node": cluster.gpus_per_node or None,
        "cpus_per_task": cluster.cpus_per_task,
        "mem": None if cluster.memory_gib is None else f"{round(cluster.memory_gib * 1024)}M",
        "signal_delay_s": max(1, cluster.signal_lead_seconds - _SLURM_EARLY_SECONDS),
        "setup": [*lines_before(runs, folder), *setup_lines(config, os.environ), "set +eu"],
        "teardown": lines_after(config),
        "srun_args": _srun_arguments(config, workdir, runs),
        "additional_parameters": more,
        "stderr_to_stdout": True,
    }
    if cluster.max_parallel_jobs is not None:
        parameters["array_parallelism"] = cluster.max_parallel_jobs
    parameters["wckey"] = None
    return {name: value for name, value in parameters.items() if value is not None or name == "wckey"}


def _srun_arguments(config: RunConfig, workdir: Path, runs: Sequence[Path]) -> list[str]:
    cluster = config.cluster
    arguments = ["--kill-on-bad-exit=1"]
    if node_range(config).is_elastic:
        arguments.append("--ntasks-per-node=1")
    if cluster.cpus_per_task is not None:
        arguments.append(f"--cpus-per-task={cluster.cpus_per_task}")  # srun does not inherit it from sbatch
    if cluster.container_image is not None:
        mounts = [*(f"{folder}:{folder}" for folder in _own_folders(config, workdir, runs)), *cluster.container_mounts]
        arguments += [
            f"--container-image={cluster.container_image}",
            f"--container-mounts={','.join(mounts)}",
            f"--container-workdir={workdir}",
        ]
    return arguments


def _own_folders(config: RunConfig, workdir: Path, runs: Sequence[Path]) -> list[Path]:
    """What a container must have at the same path: the project, the code, and the runs, wherever they lie."""
    root = Path(config.runs_root).absolute()
    elsewhere = [run for run in runs if not run.is_relative_to(root)]
    root_too = [root] if len(elsewhere) < len(runs) else []  # nobody may have made it: pyxis would refuse
    return list(dict.fromkeys([Path.cwd(), workdir, *root_too, *elsewhere]))


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Submit as if from no job: what an outer one has set would bind the new one to it."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(outside_of_jobs(before))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _last_words(text: str) -> str:
    """What sbatch has said, out of what submitit wraps around it."""
    said = [line.partition("sbatch: ")[2] for line in text.splitlines() if "sbatch: " in line]
    return " ".join(line.removeprefix("error: ") for line in said) or text.strip()

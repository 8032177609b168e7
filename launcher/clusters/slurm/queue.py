"""What SLURM itself says of a job, and what it is told to do with one: squeue, sacct, scontrol, scancel."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.environment import outside_of_jobs

__all__ = [
    "NoQueueError",
    "QueueError",
    "SlurmJob",
    "ask",
    "cancel",
    "has_others",
    "hostnames",
    "requeue",
    "requeue_without",
    "scripts_below",
    "show",
]

_TIMEOUT_SECONDS = 20.0
_PAUSE_SECONDS = 1.0
_WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
_THERE = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT")
_FIELDS = "%i|%T|%r|%S|%N"


class QueueError(Exception):
    """SLURM could not be asked, or has refused; says why."""


class NoQueueError(QueueError):
    """SLURM's commands are not here."""


@dataclass(frozen=True)
class SlurmJob:
    """A job, or an element of an array, as SLURM sees it."""

    job_id: str
    state: str
    """SLURM's word, such as PENDING."""
    reason: str | None = None
    """Why it waits, or how it ended."""
    starts: str | None = None
    """When it has started, or is expected to."""
    nodes: str | None = None

    @property
    def is_alive(self) -> bool:
        """Whether it is there, or will be: it may still write into the run."""
        return self.state in _WAITING + _THERE

    @property
    def waits(self) -> bool:
        """Whether it is in the queue, to be started, or started again."""
        return self.state in _WAITING

    def __str__(self) -> str:
        return f"job {self.job_id} {self.state}" + (f" ({self.reason})" if self.reason else "")


def ask(job_ids: Iterable[str]) -> dict[str, SlurmJob]:
    """What SLURM knows of jobs; those that it has forgotten are left out.

    Raises:
        QueueError: it cannot be asked from here.
    """
    wanted = sorted(set(job_ids))
    if not wanted:
        return {}
    found = {job.job_id: job for job in _squeue(wanted)}
    missing = [job_id for job_id in wanted if job_id not in found]
    if missing:
        found |= {job.job_id: job for job in _sacct(missing) if job.job_id in missing}
    return {job_id: found[job_id] for job_id in wanted if job_id in found}


def _squeue(job_ids: Sequence[str]) -> list[SlurmJob]:
    words = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(job_ids)}", f"--format={_FIELDS}"]
    try:
        text = run(words)
    except QueueError as error:
        if "Invalid job id" in str(error):
            return []
        raise
    jobs = []
    for line in text.splitlines():
        job_id, state, reason, starts, nodes = line.strip().split("|", 4)
        jobs.append(SlurmJob(job_id, state, _known(reason), _known(starts), _known(nodes)))
    return jobs


def _sacct(job_ids: Sequence[str]) -> list[SlurmJob]:
    """From the accounting, where a cluster has one."""
    words = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State,ExitCode,Start,NodeList"]
    try:
        text = run([*words, f"--jobs={','.join(job_ids)}"])
    except QueueError:
        return []
    jobs = []
    for line in text.splitlines():
        fields = line.strip().split("|", 4)
        if len(fields) == 5:
            job_id, state, exit_code, starts, nodes = fields
            ended = None if exit_code == "0:0" else f"exit code {exit_code}"
            jobs.append(
                SlurmJob(job_id, state.split()[0] if state else "UNKNOWN", ended, _known(starts), _known(nodes))
            )
    return jobs


def scripts_below(folder: Path) -> dict[str, Path]:
    """This user's jobs whose batch file lies in ``folder``, by id, that of the array for an array's elements.

    Raises:
        QueueError: SLURM cannot be asked.
    """
    text = run(["squeue", "--noheader", "--states=all", f"--user={os.getuid()}", "--format=%F|%o"])
    rows = (line.strip().partition("|") for line in text.splitlines())
    return {job_id: Path(script) for job_id, _, script in rows if Path(script).parent == folder}


def show(job_id: str, patience_seconds: float = 0.0) -> dict[str, str]:
    """``scontrol show job``, as fields.

    Args:
        job_id: of the job.
        patience_seconds: how long a SLURM that does not answer is asked again.

    Raises:
        QueueError: SLURM cannot be asked, or has forgotten it.
    """
    end = time.monotonic() + patience_seconds
    while True:
        try:
            text = run(["scontrol", "--oneliner", "show", "job", job_id])
            break
        except NoQueueError:
            raise
        except QueueError:
            if time.monotonic() >= end:
                raise
            time.sleep(_PAUSE_SECONDS)
    pairs = (word.partition("=") for word in text.split())
    return {key: value for key, assigned, value in pairs if assigned}


def hostnames(node_list: str) -> list[str]:
    """The nodes of SLURM's short form, in its order: that of their tasks."""
    return run(["scontrol", "show", "hostnames", node_list]).split()


def requeue(job_id: str) -> None:
    """Have the job end, and begin again when it is its turn; raises QueueError if SLURM refuses."""
    run(["scontrol", "requeue", job_id])


def requeue_without(job_id: str, nodes: Iterable[str]) -> None:
    """Requeue the job, and have it start without these nodes, too; raises QueueError if SLURM refuses.

    SLURM changes no job that runs; and with the requeue it sends SIGTERM to all that runs in the job, this
    process's children included, which are started with that held back. The process itself lives on for KillWait.
    """
    before = _known(show(job_id).get("ExcNodeList", ""))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        requeue(job_id)
        run(["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(filter(None, (before, *nodes)))}"])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def has_others(job_id: str, nodes: Iterable[str], folder: Path) -> bool:
    """Whether SLURM could ever start the job without these nodes, and those that it is without already.

    Args:
        job_id: of the job.
        nodes: their names.
        folder: of what was submitted.
    """
    script = next(folder.glob("*_submission.sh"), None)
    if script is None:
        return False
    try:
        before = _known(show(job_id).get("ExcNodeList", ""))
        words = ["sbatch", "--test-only", f"--exclude={','.join(filter(None, (before, *nodes)))}", str(script)]
        run(words, outside_of_jobs(os.environ))
    except QueueError:
        return False
    return True


def cancel(job_id: str, signal: str | None = None) -> None:
    """End the job for good, or send a signal to all processes of its steps."""
    run(["scancel", *([f"--signal={signal}"] if signal else []), job_id])


def run(words: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """What a command of SLURM prints; raises QueueError with its own words if it fails."""
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False, env=environment
        )
    except FileNotFoundError:
        raise NoQueueError(f"there is no {words[0]} here: this is no node of a SLURM cluster") from None
    except subprocess.TimeoutExpired:
        raise QueueError(f"{words[0]} has not answered within {_TIMEOUT_SECONDS:g} s") from None
    if done.returncode != 0:
        raise QueueError(f"{words[0]}: {(done.stderr or done.stdout).strip() or f'exit code {done.returncode}'}")
    return done.stdout


def _known(word: str) -> str | None:
    return None if word in ("", "None", "N/A", "(null)", "Unknown") else word

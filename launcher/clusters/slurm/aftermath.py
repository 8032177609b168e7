"""The shell that comes after the workers in a batch file: a turn of the job whose tasks were killed is brought back.

A task that dies of a signal (of the kernel, out of memory) cannot say so, and srun ends the others then. Left to act is
this shell, which no task's end takes along.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from launcher.clusters.slurm.joblog import LOST, TASK_ENDED
from launcher.config.schema import RunConfig
from launcher.errors import EXIT_UNWRITABLE

__all__ = ["lines_after", "lines_before"]

_JOB = """tminus_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
tminus_job=${tminus_job:-$SLURM_JOB_ID}"""
_STATE = """tminus_state=
for tminus_seconds in 1 2 4 8 0; do
    tminus_state=$(scontrol --oneliner show job "$tminus_job" | grep -o 'JobState=[A-Z]*') && break
    sleep $tminus_seconds
done"""


def lines_before(runs: Sequence[Path]) -> list[str]:
    """What is to be noted before anything else.

    Args:
        runs: the directories of the array's runs, in its order, or of the one run.
    """
    return [
        f"tminus_runs=({' '.join(shlex.quote(str(run)) for run in runs)})",
        'tminus_status="${tminus_runs[${SLURM_ARRAY_TASK_ID:-0}]}/status.json"',
        'tminus_before=$(cat "$tminus_status" 2> /dev/null)',
        "tminus_start=$(stat -Lc %s /proc/$$/fd/2)",
    ]


def lines_after(config: RunConfig) -> list[str]:
    """What follows srun.

    The first node has decided how the job goes on if the run's state says so; a run that is still said to be at work
    has lost its tasks. It is requeued as a stopped one is, unless SLURM has another opinion of the job already:
    cancelled, out of time, or requeued. A turn that has come to nothing, not even to a new status, is tried again
    ``max_restarts`` times at most; of all others the next turn counts those without progress.
    """
    lines = [
        "tminus_code=$?",
        """if [ $tminus_code -ge 128 ] && grep -Eqs '"state": "(submitted|running|stopping)"' "$tminus_status"; then""",
        # Where nothing can be written the next turn could not begin either.
        f'{{ echo > "$tminus_status.probe"; }} 2> /dev/null || exit {EXIT_UNWRITABLE}; rm "$tminus_status.probe"',
        f"tminus_said=$(tail -c +$((tminus_start + 1)) /proc/$$/fd/2 | grep -m1 '^{TASK_ENDED}')",
        f'echo "{LOST}${{SLURM_RESTART_COUNT:-0}}: ${{tminus_said:-srun has ended with exit code $tminus_code}}" >&2',
    ]
    if config.cluster.requeue:
        lines += [
            *_JOB.splitlines(),
            *_STATE.splitlines(),
            f'if [ "$(cat "$tminus_status")" = "$tminus_before" ] && '
            f'[ "${{SLURM_RESTART_COUNT:-0}}" -ge {config.cluster.max_restarts} ]; then',
            'echo "launch: not requeued: it has not come to an attempt" >&2',
            'elif [ "${tminus_state:-JobState=RUNNING}" = JobState=RUNNING ]; then',
            'scontrol requeue "$tminus_job"',
            "fi",
        ]
    return [*lines, "fi", "exit $tminus_code"]

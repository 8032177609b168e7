"""The shell around the workers in a batch file: a turn of the job whose tasks were killed, or did not come.

A task that dies of a signal (of the kernel, out of memory) cannot say so, and srun ends the others then; neither can
one whose Python does not start. Left to act is this shell, which no task's end takes along.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from launcher.clusters.slurm.joblog import LOST, QUEUED, TASK_ENDED, TURN
from launcher.clusters.slurm.notes import first_node_problem
from launcher.config.schema import RunConfig
from launcher.errors import EXIT_FINISHED, EXIT_RESUMABLE, EXIT_UNWRITABLE

__all__ = ["lines_after", "lines_before"]

_JOB = """tminus_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
tminus_job=${tminus_job:-$SLURM_JOB_ID}
tminus_turn=${SLURM_RESTART_COUNT:-0}"""
_DECIDED = f"{EXIT_FINISHED}|{EXIT_RESUMABLE}|{EXIT_UNWRITABLE}"
"""Exit codes of tasks that leave nothing to do."""
_WHY = f"""tminus_said=$(tail -c +$((tminus_start + 1)) /proc/$$/fd/2 | grep '^srun: ')
tminus_said=$(grep -m1 '^{TASK_ENDED}' <<< "$tminus_said" ||
    grep -m1 '^srun: error: ' <<< "$tminus_said" || head -n 1 <<< "$tminus_said")
tminus_node=$(sed -n 's/^srun: error: \\(.*\\): tasks* .*: Exited with exit code .*/\\1/p' <<< "$tminus_said")
if [ -s "$tminus_problem" ]; then
    tminus_said=$(cat "$tminus_problem") tminus_node=$SLURMD_NODENAME
fi"""
"""What has happened, and the nodes whose task has ended by itself, or has not come."""
_STATE = """for tminus_seconds in 1 2 4 8 0; do
    tminus_shown=$(scontrol --oneliner show job "$tminus_job") && break
    sleep $tminus_seconds
done
tminus_field() { grep -o "\\b$1=[^ ]*" <<< "$tminus_shown" | cut -d= -f2; }
tminus_state=$(tminus_field JobState) tminus_restarts=$(tminus_field Restarts)"""
_WITHOUT = f"""tminus_without=$(tminus_field ExcNodeList)
    [ "$tminus_without" = "(null)" ] && tminus_without=
    tminus_without=${{tminus_without:+$tminus_without,}}$tminus_node
    if sbatch --test-only --exclude="$tminus_without" "$0" 2> /dev/null; then
        tminus_then="{QUEUED}, without $tminus_node"
    else
        tminus_without= tminus_then="not requeued: SLURM has no other node for it\""""
_ACT = """trap '' TERM  # SLURM sends it to all that runs in a job which it requeues
    scontrol requeue "$tminus_job"
    [ -z "$tminus_without" ] || scontrol update JobId="$tminus_job" ExcNodeList="$tminus_without\""""


def lines_before(runs: Sequence[Path], folder: Path) -> list[str]:
    """What is to be noted before anything else.

    Args:
        runs: the directories of the array's runs, in its order, or of the one run.
        folder: of the submission.
    """
    return [
        f"tminus_runs=({' '.join(shlex.quote(str(run)) for run in runs)})",
        'tminus_status="${tminus_runs[${SLURM_ARRAY_TASK_ID:-0}]}/status.json"',
        'tminus_before=$(cat "$tminus_status" 2> /dev/null)',
        "tminus_start=$(stat -Lc %s /proc/$$/fd/2)",
        *_JOB.splitlines(),
        f"tminus_problem={shlex.quote(str(folder))}/{first_node_problem(Path(), '$tminus_job', '$tminus_turn')}",
        f"tminus_tried={shlex.quote(str(folder))}/without-attempt-$tminus_job",
        f'echo "{TURN}$tminus_turn of job $tminus_job on $SLURM_JOB_NODELIST"',
    ]


def lines_after(config: RunConfig) -> list[str]:
    """What follows srun.

    The first node has decided how the job goes on if the run's state says so; a run that is still said to be at work
    has lost its tasks. It is requeued as a stopped one is, unless SLURM has another opinion of the job already:
    cancelled, out of time, or requeued. Turns in a row that have come to nothing, not even to a new status, are
    followed by another ``max_restarts`` times at most; of all others the next turn counts those without progress. A
    node on which a task has ended by itself, or has not come to the run, is excluded from the job; where SLURM has no
    other for it, the job ends.
    """
    lines = [
        "tminus_code=$?",
        f'case $tminus_code in {_DECIDED}) rm -f "$tminus_tried"; exit $tminus_code ;; esac',
        """grep -Eqs '"state": "(submitted|running|stopping)"' "$tminus_status" || exit $tminus_code""",
        # Where nothing can be written the next turn could not begin either.
        f'{{ echo > "$tminus_status.probe"; }} 2> /dev/null || exit {EXIT_UNWRITABLE}; rm "$tminus_status.probe"',
        *_WHY.splitlines(),
        "tminus_then= tminus_without=",
    ]
    if config.cluster.requeue:
        lines += [
            *_STATE.splitlines(),
            'if [ "$(cat "$tminus_status")" = "$tminus_before" ]; then echo >> "$tminus_tried"; '
            'else rm -f "$tminus_tried"; fi',
            'if [ "${tminus_state:-RUNNING}" != RUNNING ] || '
            '[ "${tminus_restarts:-$tminus_turn}" != "$tminus_turn" ]; then',
            ": # SLURM has decided",
            'elif [ ! -e "$tminus_tried" ]; then',
            f'tminus_then="{QUEUED}"',
            f'elif [ "$(wc -l < "$tminus_tried")" -gt {config.cluster.max_restarts} ]; then',
            'tminus_then="not requeued: it has not come to an attempt"',
            'elif [ -n "$tminus_node" ]; then',
            *_WITHOUT.splitlines(),
            "fi",
            "elif [ $tminus_code -ge 128 ]; then",
            f'tminus_then="{QUEUED}"',
            "fi",
        ]
    lines.append(
        f'echo "{LOST}$tminus_turn: ${{tminus_said:-srun has ended with exit code $tminus_code}}'
        '${tminus_then:+; $tminus_then}" >&2'
    )
    if config.cluster.requeue:
        lines += [f'if [[ "$tminus_then" = "{QUEUED}"* ]]; then', *_ACT.splitlines(), "fi"]
    return [*lines, "exit $tminus_code"]

"""``launch check`` of a job: what would be submitted, when it would start, and who would share the batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from launcher.clusters.slurm import batch
from launcher.config.schema import RunConfig
from launcher.config.sizes import accumulation_steps, node_range, usable_nodes, world_size
from launcher.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_REQUEST
from launcher.observe.terminal import say

__all__ = ["check"]


def check(config: RunConfig) -> int:
    """Print what would be submitted, and ask SLURM when it would start.

    Returns:
        The exit code: 0, 2 if SLURM would refuse it, 1 if it does not answer.
    """
    run = Path(config.run_dir or Path(config.runs_root) / config.name / "ID").absolute()
    folder = run / "submission" / "0"
    text = batch.batch_file(config, run, folder, folder / batch.CODE if config.cluster.snapshot else Path.cwd())
    say(text)
    accepted, words = batch.test_only(text)
    if accepted is None:
        say(f"SLURM does not answer, so whether it would take the job is not known: {words}", error=True)
    else:
        say(f"SLURM says: {words}" if accepted else f"SLURM would refuse it: {words}", error=not accepted)
    for line in _shares(config):
        say(line)
    say("nothing was submitted")
    return {True: EXIT_FINISHED, False: EXIT_REQUEST, None: EXIT_FAILED}[accepted]


def _shares(config: RunConfig) -> Iterator[str]:
    """For each number of machines that there may be, who shares the global batch, and how."""
    for count in node_range(config).counts:
        usable = usable_nodes(config, count)
        workers = world_size(config, usable)
        of_them = "" if usable == count else f", of which {usable} train"
        micro = f"{accumulation_steps(config, workers)} micro-batch(es) of {config.train.micro_batch_size} in a step"
        yield f"on {count} node(s){of_them}: {workers} worker(s) on {config.device.value}, each {micro}"

"""What one optimizer step costs beside arithmetic: collectives, bytes, waits, passes; two gloo ranks."""

from __future__ import annotations

from launcher.jobs.language_model import LanguageModelJob

from benchmarks.common import print_table, run_ranks
from benchmarks.contestants import HandWritten, Setup, random_batches
from benchmarks.counting import Counts, counted_steps
from launcher.training.step import train_step

__all__ = ["all_counts"]

STRATEGIES = ("ddp", "zero2", "fsdp")


def _setup(strategy: str, attribute: bool = False) -> Setup:
    job = LanguageModelJob(context=16, num_layers=2, num_heads=2, width=64)
    return Setup(job, strategy=strategy, dtype="bfloat16", attribute=attribute, micro_batch_size=2)


def ours(rank: int, world_size: int, strategy: str, attribute: bool) -> Counts:
    """One rank's, of this engine."""
    setup = _setup(strategy, attribute)
    learner = setup.learner(rank, world_size)
    batches = random_batches(setup.job, setup.accumulation_steps, setup.micro_batch_size)

    def step() -> None:
        train_step(learner, batches, stop=False).read()

    return counted_steps(step, learner.model.module.parameters(), world_size)


def by_hand(rank: int, world_size: int, strategy: str) -> Counts:
    """One rank's, of the same training written with torch."""
    setup = _setup(strategy)
    contestant = HandWritten(setup, world_size)
    batches = random_batches(setup.job, setup.accumulation_steps, setup.micro_batch_size)
    return counted_steps(lambda: contestant.step(batches), contestant.model.parameters(), world_size)


def all_counts(rank: int, world_size: int) -> dict[tuple[str, str], Counts]:
    """One rank's, of everybody: by strategy and contestant (by hand, ours, attributing)."""
    found = {}
    for strategy in STRATEGIES:
        if strategy != "zero2":
            found[strategy, "by hand"] = by_hand(rank, world_size, strategy)
        found[strategy, "ours"] = ours(rank, world_size, strategy, attribute=False)
        found[strategy, "ours, attributing overflows"] = ours(rank, world_size, strategy, attribute=True)
    return found


def main() -> None:
    """Print the table."""
    found = run_ranks(2, all_counts)[0]
    header = ["", "control collectives", "bytes", "other collectives", "MB", "host syncs", "passes", "in backward"]
    title = "One step, two ranks, accumulation 2, BF16, loss scale on, fused AdamW, clipping"
    print_table(title, header, [_row(", ".join(who), counts) for who, counts in found.items()])


def _row(name: str, counts: Counts) -> list[object]:
    return [
        name,
        f"{counts.control_collectives:g}",
        f"{counts.control_bytes:.0f}",
        f"{counts.gradient_collectives:g}",
        counts.gradient_bytes / 1e6,
        f"{counts.host_syncs:g}",
        counts.gradient_passes,
        counts.probe_passes,
    ]


if __name__ == "__main__":
    main()

"""What codecs cost in quality: the validation loss of gpt_tiny, and the error of one reduction over many ranks.

``python -m benchmarks.wire_quality``; ``--only reduction`` or ``--only training`` for one of the two, ``--quick`` for a
look. Needs matplotlib for the plot (the ``bench`` extra). Training is on two CPU workers; ranks of a reduction are
simulated in this process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import print_table
from benchmarks.many_ranks import exchanged_mean, ring_mean, tree_mean
from launcher.compression.codecs import BlockInt8, Half

PLOT = Path(__file__).with_suffix(".png")
SEEDS = (0, 1, 2)
STEPS = 100
_SCALED = ("precision.loss_scale.enabled=true", "precision.loss_scale.initial=1024")
ARMS: dict[str, tuple[str, ...]] = {
    "none": (),
    "fp16": ("compression=fp16", *_SCALED),
    "bf16": ("compression=bf16",),
    "int8, error feedback": ("compression=int8",),
    "int8": ("compression=int8", "compression.error_feedback=false"),
    "powersgd, rank 4 from step 20": ("compression=powersgd", "compression.start_step=20"),
}
_TARGET = 0.01
_JUDGED = ("fp16", "bf16", "int8, error feedback")


def train(arm: str, seed: int, steps: int) -> float:
    """The validation loss of gpt_tiny at the end."""
    with tempfile.TemporaryDirectory() as folder:
        options = (f"seed={seed}", f"train.max_steps={steps}", "cluster.processes_per_node=2", "device=cpu")
        command = [sys.executable, "-m", "launcher", "+experiment=gpt_tiny", "run_dir=run", *options, *ARMS[arm]]
        ended = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if ended.returncode:
            raise RuntimeError(f"{arm}, seed {seed}: {ended.stdout}{ended.stderr}")
        result = json.loads((Path(folder) / "run" / "result.json").read_text())
        return float(result["validation"]["loss"])


def compare_training(seeds: tuple[int, ...], steps: int) -> None:
    """Every codec against none, of one seed each."""
    losses: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in seeds:
        for arm in ARMS:
            losses[arm].append(train(arm, seed, steps))
            print(f"seed {seed}, {arm}: {losses[arm][-1]:.5f}", file=sys.stderr, flush=True)
    rows: list[list[object]] = []
    for arm, found in losses.items():
        relative = [own / base - 1 for own, base in zip(found, losses["none"], strict=True)]
        met = "–"
        if arm in _JUDGED:
            met = "yes" if abs(statistics.mean(relative)) <= _TARGET else "no"
        each = ", ".join(f"{100 * value:+.2f}" for value in relative)
        mean, spread = 100 * statistics.mean(relative), 100 * (max(relative) - min(relative))
        rows.append([arm, f"{statistics.mean(found):.4f}", f"{mean:+.2f} %", f"{spread:.2f} %", each, met])
    header = ["", "validation loss", "against none", "spread", "each seed, %", "within 1 %"]
    print_table(f"gpt_tiny after {steps} steps, {len(seeds)} seeds", header, rows)


Reduce = Callable[[Callable[[int], Tensor], int], Tensor]
WAYS: dict[str, Reduce] = {
    "fp16, summed on the wire along a ring": lambda values, ranks: ring_mean(torch.float16, values, ranks),
    "fp16, summed on the wire in a tree": lambda values, ranks: tree_mean(torch.float16, values, ranks),
    "fp16, summed in FP32": lambda values, ranks: exchanged_mean(Half(torch.float16), values, ranks),
    "bf16, summed in FP32": lambda values, ranks: exchanged_mean(Half(torch.bfloat16), values, ranks),
    "int8, summed in FP32": lambda values, ranks: exchanged_mean(BlockInt8(128), values, ranks),
}
_NUMEL = 4096
_LOSS_SCALE = 1024.0
_COMMON = 0.1


def gradient(rank: int) -> Tensor:
    """Noise of each rank's own around what all have in common; blocks of several magnitudes; with a loss scale."""
    magnitudes = torch.exp2(torch.arange(_NUMEL // 128).remainder(8).float() - 8).repeat_interleave(128)
    common = torch.randn(_NUMEL, generator=torch.Generator().manual_seed(1)) * _COMMON
    own = torch.randn(_NUMEL, generator=torch.Generator().manual_seed(2 + rank))
    return (common + own) * magnitudes * _LOSS_SCALE


def compare_reductions(largest: int) -> None:
    """The relative error (L2) of one mean against float64, without error feedback."""
    counts = [2**power for power in range(1, largest.bit_length())]
    errors: dict[str, list[float]] = {name: [] for name in WAYS}
    for num_ranks in counts:
        exact = torch.zeros(_NUMEL, dtype=torch.float64)
        for rank in range(num_ranks):
            exact += gradient(rank).double()
        exact /= num_ranks
        for name, reduce in WAYS.items():
            lost = (reduce(gradient, num_ranks).double() - exact).norm() / exact.norm()
            errors[name].append(lost.item())
    header = ["ranks", *WAYS]
    rows = [[count, *(f"{errors[name][index]:.1e}" for name in WAYS)] for index, count in enumerate(counts)]
    print_table("Relative error of one reduction, against float64", header, rows)
    draw(counts, errors)


def draw(counts: list[int], errors: dict[str, list[float]]) -> None:
    """The plot beside this file."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=110)
    for name, marker in zip(errors, "osv^D", strict=True):
        axes.plot(counts, errors[name], marker=marker, markersize=4, label=name)
    axes.set(yscale="log", ylim=(1e-4, 1e-1), xlabel="ranks", ylabel="relative error of the mean (L2)")
    axes.set_xscale("log", base=2)
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=8, ncols=2, loc="upper center")
    figure.tight_layout()
    figure.savefig(PLOT)
    print(f"plot: {PLOT.name}\n", flush=True)


def main() -> None:
    """Print the tables and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, 20 steps, at most 64 ranks")
    parser.add_argument("--only", choices=["reduction", "training"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.only != "training":
        compare_reductions(64 if arguments.quick else 4096)
    if arguments.only != "reduction":
        compare_training(SEEDS[:1] if arguments.quick else SEEDS, 20 if arguments.quick else STEPS)


if __name__ == "__main__":
    main()

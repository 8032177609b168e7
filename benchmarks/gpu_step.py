"""GPT-2 of 124 million parameters in FP16 on one GPU, compiled: this engine against the same loop by hand."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

import torch
from launcher.jobs.language_model import LanguageModelJob

from benchmarks.common import interleaved, print_table
from benchmarks.contestants import HandWritten, Setup, random_batches
from launcher.training.outcome import StepTicket
from launcher.training.step import train_step

_PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40": 181.0, "4090": 165.0, "V100": 125.0}
"""Dense FP16 with FP32 accumulation, from the vendor's data sheets, by a part of the device's name."""


def _ours(setup: Setup) -> Callable[[], None]:
    learner = setup.learner(0, 1)
    batches = random_batches(setup.job, setup.accumulation_steps, setup.micro_batch_size, setup.device)
    pending: list[StepTicket] = []

    def step() -> None:
        ticket = train_step(learner, batches, stop=False)
        if pending:
            pending.pop().read()  # as the loop does: the step before
        pending.append(ticket)

    return step


def _by_hand(setup: Setup) -> Callable[[], None]:
    contestant = HandWritten(setup, world_size=1)
    batches = random_batches(setup.job, setup.accumulation_steps, setup.micro_batch_size, setup.device)

    def step() -> None:
        contestant.step(batches)

    return step


def _flops(setup: Setup) -> float:
    """Of a step: 6 per weight of a matrix product and token, and the attention's 12 x layers x width x length."""
    job = setup.job
    weights = 12 * job.num_layers * job.width**2 + job.vocabulary_size * job.width
    per_token = 6 * weights + 12 * job.num_layers * job.width * job.context
    return float(per_token * _tokens(setup))


def _tokens(setup: Setup) -> int:
    return setup.accumulation_steps * setup.micro_batch_size * setup.job.context


def _host_syncs(step: Callable[[], None]) -> int:
    """Operations that waited for the device, as torch's own debug mode sees them."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def _peak_gib(step: Callable[[], None]) -> float:
    """The allocator's peak in a step, above what is held before it, in GiB."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def _held_gib(build: Callable[[], Callable[[], None]]) -> tuple[Callable[[], None], float]:
    """A contestant that has made its first steps, and what it holds between steps, in GiB."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    step = build()
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    return step, (torch.cuda.memory_allocated() - before) / 2**30


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10, help="in a block")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--micro-batch-size", type=int, default=16)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_step: skipped, this machine has no GPU.")
        return
    job = LanguageModelJob(context=1024, vocabulary_size=50304, num_layers=12, num_heads=12, width=768)
    setup = Setup(job, dtype="float16", device="cuda", compile=True, micro_batch_size=options.micro_batch_size)
    hand, hand_held = _held_gib(lambda: _by_hand(setup))
    ours, ours_held = _held_gib(lambda: _ours(setup))
    steps, held = {"by hand": hand, "ours": ours}, {"by hand": hand_held, "ours": ours_held}

    def block(step: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(options.steps):
                step()
            torch.cuda.synchronize()

        return run

    timings = interleaved({name: block(step) for name, step in steps.items()}, "by hand", options.rounds)
    peak = next((value for name, value in _PEAK_TFLOPS.items() if name in torch.cuda.get_device_name()), None)
    rows: list[list[object]] = []
    for name, timing in timings.items():
        seconds = timing.seconds / options.steps
        used = "?" if peak is None else f"{_flops(setup) / seconds / peak / 1e12:.1%}"
        memory = held[name] + _peak_gib(steps[name])
        speed = f"{_tokens(setup) / seconds:.0f}"
        rows.append([name, seconds * 1e3, timing.ratio, speed, used, memory, _host_syncs(steps[name])])
    header = ["who", "ms a step", "ratio", "tokens/s", "FLOP used", "peak GiB", "host syncs"]
    print_table("GPT-2 124M, FP16, one GPU, compiled", header, rows)


if __name__ == "__main__":
    main()

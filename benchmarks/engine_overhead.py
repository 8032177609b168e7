"""Whole training steps on two gloo workers: this engine's loop, one by hand, Lightning Fabric and Accelerate.

All train a GPT of 0.8 million parameters in FP32 with the same batches, accumulation and optimizer. The
first two scale the loss; the libraries have no loss scale on CPUs, and so do less.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from launcher.jobs.language_model import LanguageModelJob
from torch.utils.data import DataLoader, DistributedSampler

from benchmarks.common import Timing, interleaved, print_table, run_ranks
from benchmarks.contestants import MAX_GRAD_NORM, Batch, HandWritten, Setup
from launcher.observe import RunFacts, build_reporter
from launcher.rundir import RunDirectory, State, Status
from launcher.training.batches import BatchShape, TrainingData
from launcher.training.loop import Trainer
from launcher.training.stop import StopRequest

_HAND = "by hand"
_SETUP = Setup(LanguageModelJob(max_bytes=500_000, validation_fraction=0.0), micro_batch_size=4)


class _Engine:
    """The engine's loop, with its report, taken up again for each block of steps."""

    def __init__(self, setup: Setup, rank: int, world_size: int, folder: Path) -> None:
        folder.mkdir(parents=True)
        config, job = setup.config(), setup.job
        dataset = job.build_dataset("train")
        assert dataset is not None
        shape = BatchShape(setup.micro_batch_size, setup.accumulation_steps, world_size)
        device = torch.device(setup.device)
        facts = RunFacts("benchmark", 0, 1_000_000, shape.global_batch_size, len(dataset), 1e-3, device)
        terminal = (folder / "console").open("w") if rank == 0 else None
        status = Status(State.running, attempt=0, hosts=("localhost",))
        self.trainer = Trainer(
            learner=setup.learner(rank, world_size),
            data=TrainingData(job, dataset, shape, rank, seed=0),
            validation=None,
            config=config.train,
            loss_scale=config.precision.loss_scale,
            total_steps=0,
            reporter=build_reporter(RunDirectory(folder), facts, terminal, "plain", 10, status),
            stop=StopRequest(),
            hosts=("localhost",) * world_size,
        )

    def __call__(self, steps: int) -> None:
        self.trainer.total_steps += steps
        self.trainer.train()


class _Hand:
    """A loop by hand, which reports every tenth loss."""

    def __init__(self, setup: Setup, world_size: int, batches: Iterator[Batch], folder: Path) -> None:
        self.contestant = HandWritten(setup, world_size)
        self.batches = batches
        self.log = (folder / f"by-hand-{os.getpid()}").open("w")

    def __call__(self, steps: int) -> None:
        for step in range(steps):
            loss = self.contestant.step(list(itertools.islice(self.batches, self.contestant.setup.accumulation_steps)))
            if step % 10 == 0:
                print(json.dumps({"step": step, "loss": loss}), file=self.log, flush=True)


def _loader(setup: Setup, sampler: DistributedSampler[Any] | None) -> DataLoader[Any]:
    dataset = setup.job.build_dataset("train")
    assert dataset is not None
    return DataLoader(dataset, setup.micro_batch_size, shuffle=sampler is None, sampler=sampler, drop_last=True)


def _endless(loader: Any) -> Iterator[Batch]:
    while True:
        yield from loader


def _loss(model: Callable[[Any], Any], batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def _fabric(setup: Setup, world_size: int) -> Callable[[int], None]:
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

    fabric = Fabric(accelerator="cpu", strategy=DDPStrategy(gradient_as_bucket_view=True), devices=world_size)
    fabric.launch()
    bare = setup.job.build_model()
    model, optimizer = fabric.setup(bare, setup.optimizer(bare))
    batches = _endless(fabric.setup_dataloaders(_loader(setup, None)))
    last = setup.accumulation_steps - 1

    def run(steps: int) -> None:
        for _ in range(steps):
            total = torch.zeros(())
            for index in range(setup.accumulation_steps):
                with fabric.no_backward_sync(model, enabled=index < last):
                    loss = _loss(model, next(batches)) / setup.accumulation_steps
                    fabric.backward(loss)
                total += loss.detach()
            fabric.clip_gradients(model, optimizer, max_norm=MAX_GRAD_NORM, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            fabric.all_reduce(total, reduce_op="mean").item()

    return run


def _accelerate(setup: Setup) -> Callable[[int], None]:
    from accelerate import Accelerator, DistributedDataParallelKwargs

    kwargs = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    steps_of = setup.accumulation_steps
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps_of, kwargs_handlers=[kwargs])
    bare = setup.job.build_model()
    model, optimizer, loader = accelerator.prepare(bare, setup.optimizer(bare), _loader(setup, None))
    batches = _endless(loader)

    def run(steps: int) -> None:
        for _ in range(steps):
            total = torch.zeros(())
            for _ in range(steps_of):
                batch = next(batches)
                with accelerator.accumulate(model):
                    loss = _loss(model, batch)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
                    optimizer.step()
                    optimizer.zero_grad()
                total += loss.detach() / steps_of
            accelerator.reduce(total, "mean").item()

    return run


def measure(rank: int, world_size: int, steps: int, rounds: int, libraries: bool) -> dict[str, Timing]:
    """Blocks of steps, interleaved."""
    named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in named.items()})
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", TORCHELASTIC_RUN_ID="benchmark", OMP_NUM_THREADS="1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = _SETUP.job.build_dataset("train")
        assert dataset is not None
        batches = _endless(_loader(_SETUP, DistributedSampler(dataset, world_size, rank)))
        attributing = Setup(_SETUP.job, micro_batch_size=_SETUP.micro_batch_size, attribute=True)
        contestants: dict[str, Callable[[int], None]] = {
            _HAND: _Hand(_SETUP, world_size, batches, folder),
            "ours": _Engine(_SETUP, rank, world_size, folder / "plain"),
            "ours, attributing overflows (as it comes)": _Engine(attributing, rank, world_size, folder / "attributing"),
        }
        if libraries:
            contestants["Lightning Fabric"] = _fabric(_SETUP, world_size)
            contestants["Accelerate"] = _accelerate(_SETUP)
        assert torch.get_num_threads() == 1
        return interleaved({name: lambda run=run: run(steps) for name, run in contestants.items()}, _HAND, rounds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10, help="in a block")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--without-libraries", action="store_true")
    options = parser.parse_args()
    found = run_ranks(2, measure, options.steps, options.rounds, not options.without_libraries)[0]
    rows = [[name, time.seconds / options.steps * 1e3, time.ratio, time.cpu_ratio] for name, time in found.items()]
    print_table("A whole step, two workers x 1 thread", ["who", "ms a step", "ratio", "CPU ratio"], rows)


if __name__ == "__main__":
    main()

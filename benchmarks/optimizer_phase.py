"""From the last gradient to the stepped parameters: unscale, measure, clip, step, update the scale."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.common import Timing, interleaved, print_table, run_ranks
from launcher.config.schema import Decay, LossScaleConfig, ScheduleConfig
from launcher.precision import ControlCollective, DynamicLossScale, FoldedOptimizer, Sums
from launcher.training.outcome import StepTicket
from launcher.training.schedule import Schedule
from launcher.training.step import judge

_SCALE = 1024.0
_LAYER = ((1024, 4096), (4096, 1024), (1024, 2048), (1024, 2048), (1024,), (1024,))
_LAYER_ELEMENTS = sum(torch.Size(shape).numel() for shape in _LAYER)


class Phase:
    """One contestant's parameters; the same gradients are given to it before each step."""

    def __init__(self, num_layers: int, gradients: list[Tensor], fused: bool | None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameters = [
            nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(num_layers) for shape in _LAYER
        ]
        self.gradients = gradients
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=fused)

    def bind(self) -> None:
        """What backward leaves. Values drift as contestants divide in place; time does not depend on them."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient


class Ours(Phase):
    """One pass to measure, one collective, one pass to do the rest."""

    def __init__(self, num_layers: int, gradients: list[Tensor], rank: int, world_size: int) -> None:
        super().__init__(num_layers, gradients, fused=True)
        device = torch.device("cpu")
        self.folded = FoldedOptimizer(self.optimizer)
        self.control = ControlCollective(device, world_size, rank)
        self.scale = DynamicLossScale(LossScaleConfig(enabled=True, initial=_SCALE), device)
        self.schedule = Schedule(ScheduleConfig(decay=Decay.cosine, warmup_steps=10), 10_000, device)
        self.sums = Sums(torch.ones((), dtype=torch.float64), torch.full((), 1024.0, dtype=torch.float64))
        self.world_size = world_size

    def __call__(self) -> None:
        """As in ``train_step``."""
        self.bind()
        rate = self.schedule.factor()
        self.folded.set_rate_factor(rate)
        scale = self.scale.scale.clone()
        gradients = self.folded.gradients()
        share = 1.0 / self.world_size
        agreement = self.control.agree(gradients.values, self.sums, digest=scale.double(), stop=False, share=share)
        verdict = judge(agreement, scale, expected_items=1024.0, max_grad_norm=1.0)
        self.folded.step(verdict.divisor, verdict.found_inf)
        self.folded.zero_grad()
        self.scale.update(verdict.found_inf)
        self.schedule.advance(verdict.found_inf)
        StepTicket.of(
            step=1,
            gradients=gradients,
            agreement=agreement,
            grad_norm=verdict.grad_norm,
            found_inf=verdict.found_inf,
            loss_scale=scale,
            rate_factor=rate,
            applied_steps=self.schedule.applied_steps,
        ).read()


class Torch(Phase):
    """GradScaler, clip_grad_norm_, the scheduler and the loss's all-reduce."""

    def __init__(self, num_layers: int, gradients: list[Tensor], world_size: int, fused: bool | None) -> None:
        super().__init__(num_layers, gradients, fused)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=_SCALE)
        self.scaler.scale(torch.ones(()))  # makes the scale
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 10_000)
        self.loss = torch.ones(())
        self.world_size = world_size

    def __call__(self) -> None:
        """As torch's documentation has it."""
        self.bind()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.world_size > 1:
            dist.all_reduce(self.loss)
        self.loss.item()


def measure(rank: int, world_size: int, num_layers: int, rounds: int) -> dict[str, Timing]:
    """Against torch with a fused optimizer."""
    gradients = [torch.randn(shape) for _ in range(num_layers) for shape in _LAYER]
    contestants: dict[str, Callable[[], None]] = {
        "torch, fused AdamW": Torch(num_layers, gradients, world_size, fused=True),
        "ours": Ours(num_layers, gradients, rank, world_size),
        "torch, AdamW as it comes": Torch(num_layers, gradients, world_size, fused=None),
    }
    return interleaved(contestants, "torch, fused AdamW", rounds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, nargs="*", default=[2, 8], help="of 12.6 million parameters each")
    options = parser.parse_args()
    rows: list[list[object]] = []
    for num_layers in options.layers:
        size = f"{num_layers * _LAYER_ELEMENTS / 1e6:.0f}M"
        for world_size, threads in ((1, 2), (2, 1)):
            found = run_ranks(world_size, measure, num_layers, options.rounds, threads=threads)[0]
            where = f"{size}, {world_size} rank(s) x {threads} thread(s)"
            rows.extend([where, name, time.seconds * 1e3, time.ratio, time.cpu_ratio] for name, time in found.items())
    print_table(
        "From the last gradient to the stepped parameters", ["parameters", "who", "ms", "ratio", "CPU ratio"], rows
    )


if __name__ == "__main__":
    main()

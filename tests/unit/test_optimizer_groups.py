"""What an optimizer keeps comes back in its own type, or is refused; its settings stay those of the configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.errors import JobError
from launcher.training.step import Learner, train_step
from tests.unit.learners import learner_for, load, save, snapshot, uneven_data


class Counting(torch.optim.SGD):
    """Its rate falls with a count that it keeps in the group, as averaging optimizers do."""

    def __init__(self, params: Any, lr: float, decay: float = 0.5) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            group.update(k=0, decay=decay, mode="first", window=(0, 0), distance=torch.zeros(()))

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] += 1
            group["mode"], group["window"] = None, (group["window"][1], group["k"] / 2)
            group["distance"] = group["distance"] + 0.25
            group["made"] = float(group["k"])
            group["lr"] = group["lr"] / (1 + group["decay"] * group["k"] + group["distance"].item())
        super().step(closure)


class Sorted(Counting):
    """Beside its parameters' own kind of number it keeps sums in FP64, velocities in BF16, a flag, and counts."""

    def step(self, closure: Callable[[], float] | None = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            kept = self.state[parameter]
            for key, dtype in (("sums", torch.float64), ("velocity", torch.bfloat16), ("flags", torch.bool)):
                kept.setdefault(key, torch.zeros_like(parameter, dtype=dtype))
            kept["seen"] = kept.get("seen", torch.zeros((), dtype=torch.int64)) + 1
            kept["sums"] += parameter.grad.double() ** 2 / 3
            kept["velocity"] += parameter.grad.bfloat16()
            kept["flags"] ^= parameter.grad > 0
            parameter.grad.add_(kept["velocity"] * kept["flags"] / kept["sums"].sqrt() / kept["seen"])
        super().step(closure)


class Unsaved(Counting):
    def step(self, closure: Callable[[], float] | None = None) -> None:
        super().step(closure)
        self.param_groups[0]["made"] = object()


class Beside(Counting):
    def step(self, closure: Callable[[], float] | None = None) -> None:
        super().step(closure)
        self.state["k"] = 3


class OwnDict(Counting):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "slow_weights": []}


class Dotted(Counting):
    def step(self, closure: Callable[[], float] | None = None) -> None:
        super().step(closure)
        self.state[self.param_groups[0]["params"][0]]["ema.fast"] = torch.zeros(())


def build(kind: type[torch.optim.Optimizer], **settings: Any) -> Learner:
    target = f"{__name__}.{kind.__name__}"
    return learner_for(optimizer={"_target_": target, "lr": 0.1, **settings})


def losses(learner: Learner, steps: int) -> list[float]:
    batches = uneven_data().micro_batches(range(learner.steps, learner.steps + steps), 0, False, 0)
    return [train_step(learner, [batch], stop=False).read().loss for batch in batches]


def state(learner: Learner) -> dict[str, Any]:
    group = learner.optimizer.optimizer.param_groups[0]
    return {key: group[key] for key in ("k", "mode", "window", "distance", "made")}


@pytest.mark.parametrize("kind", [Counting, Sorted])
def test_what_is_kept_goes_on_in_its_own_type(tmp_path: Path, kind: type[Counting]) -> None:
    learner = build(kind)
    losses(learner, 3)
    save(learner, tmp_path)
    fresh = build(kind)
    assert load(fresh, tmp_path)[1] == []
    assert state(fresh) == {"k": 3, "mode": None, "window": (1.0, 1.5), "distance": torch.tensor(0.75), "made": 3.0}
    assert losses(fresh, 3) == losses(learner, 3)


def test_a_setting_that_the_optimizer_has_not_touched_is_that_of_the_configuration(tmp_path: Path) -> None:
    learner = build(Counting)
    losses(learner, 1)
    save(learner, tmp_path)
    fresh = build(Counting, decay=0.25)
    load(fresh, tmp_path)
    group = fresh.optimizer.optimizer.param_groups[0]
    assert (group["k"], group["decay"], group["lr"]) == (1, 0.25, 0.1)


def test_another_optimizer_takes_nothing(tmp_path: Path) -> None:
    learner = build(Counting)
    losses(learner, 1)
    save(learner, tmp_path)
    other = learner_for()
    assert any("it is that of Counting, and this is SGD" in note for note in load(other, tmp_path)[1])
    assert "k" not in other.optimizer.optimizer.param_groups[0]


def test_groups_that_are_no_longer_the_same_are_told(tmp_path: Path) -> None:
    learner = build(Counting)
    losses(learner, 1)
    save(learner, tmp_path)
    fresh = build(Counting)
    fresh.optimizer.optimizer.param_groups.append({**fresh.optimizer.optimizer.param_groups[0], "params": []})
    _, (note,) = load(fresh, tmp_path)
    assert "(distance, k, made, mode, window) begins anew: they were 1 and are 2" in note


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Unsaved, r"Unsaved.param_groups\[0\]\['made'\] is a builtins.object"),
        (Beside, r"Beside keeps 'k' beside its parameters' state"),
        (OwnDict, r"OwnDict keeps 'slow_weights' beside its parameters' state"),
        (Dotted, r"Dotted keeps 'ema.fast': use a key without a dot"),
    ],
)
def test_what_cannot_be_saved_is_refused_by_name(kind: type[Counting], words: str) -> None:
    learner = build(kind)
    losses(learner, 1)
    with pytest.raises(JobError, match=words):
        snapshot(learner)

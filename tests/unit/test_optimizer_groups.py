"""What an optimizer keeps in its param_groups comes back, and its settings stay those of the configuration."""

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


class Unsaved(Counting):
    def step(self, closure: Callable[[], float] | None = None) -> None:
        super().step(closure)
        self.param_groups[0]["made"] = object()


def build(kind: type[torch.optim.Optimizer], **settings: Any) -> Learner:
    target = f"{__name__}.{kind.__name__}"
    return learner_for(optimizer={"_target_": target, "lr": 0.1, **settings})


def losses(learner: Learner, steps: int) -> list[float]:
    batches = uneven_data().micro_batches(range(learner.steps, learner.steps + steps), 0, False, 0)
    return [train_step(learner, [batch], stop=False).read().loss for batch in batches]


def state(learner: Learner) -> dict[str, Any]:
    group = learner.optimizer.optimizer.param_groups[0]
    return {key: group[key] for key in ("k", "mode", "window", "distance", "made")}


def test_what_is_kept_in_the_groups_goes_on(tmp_path: Path) -> None:
    learner = build(Counting)
    losses(learner, 3)
    save(learner, tmp_path)
    fresh = build(Counting)
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


def test_what_cannot_be_saved_is_refused_by_name() -> None:
    learner = build(Unsaved)
    snapshot(learner)
    losses(learner, 1)
    with pytest.raises(JobError, match=r"Unsaved.param_groups\[0\]\['made'\] is a builtins.object"):
        snapshot(learner)

"""How far a run has come, through a checkpoint and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.training.progress import Best
from tests.unit.learners import learner_for, load, save


@pytest.mark.parametrize("best", [Best(0.25, "accuracy", "max"), Best(0.5, "loss", "min"), None])
def test_the_best_validation_comes_back_with_what_it_is_of(tmp_path: Path, best: Best | None) -> None:
    save(learner_for(), tmp_path, best)
    assert load(learner_for(), tmp_path)[0].best == best

"""What a checkpoint holds beside tensors is looked at before a learner is given it."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from launcher.checkpoint.manifest import _canonical
from launcher.errors import CheckpointError
from tests.unit.learners import UnevenJob, learner_for, load, save

SCALED: dict[str, Any] = {"precision__loss_scale__enabled": True}


def rewritten(folder: Path, change: Any) -> None:
    """The manifest of ``save``'s checkpoint as somebody else could have made it, digests and all."""
    (path,) = folder.glob("checkpoints/step-*/manifest.json")
    content = json.loads(path.read_text())
    change(content)
    for name in content["files"]:
        data = (path.parent / name).read_bytes()
        content["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    del content["sha256_of_this_file"]
    digest = hashlib.sha256(_canonical(content)).hexdigest()
    path.write_bytes(_canonical({**content, "sha256_of_this_file": digest}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("best_of", 5),
        ("best_of", ["loss"]),
        ("consecutive_skips", "x"),
        ("expected_items", 0),
        ("global_batch_size", 0),
        ("num_samples", -1),
        ("seed", None),
        ("optimizer", 3),
        ("optimizer_numbers", [1]),
        ("optimizer_numbers", {"weight.step": "x"}),
    ],
    ids=str,
)
def test_a_state_of_wrong_types_is_refused(tmp_path: Path, name: str, value: object) -> None:
    save(learner_for(), tmp_path)
    rewritten(tmp_path, lambda content: content["state"].update({name: value}))
    with pytest.raises(CheckpointError, match=rf"step-00000000 cannot be loaded: in its manifest's state {name} is"):
        load(learner_for(), tmp_path)


def test_a_loss_scale_that_is_none_is_refused(tmp_path: Path) -> None:
    save(learner_for(**SCALED), tmp_path)
    rewritten(tmp_path, lambda content: content["loss_scale"].pop("tolerance"))
    with pytest.raises(CheckpointError, match="cannot be loaded: a loss scale's state has the keys"):
        load(learner_for(**SCALED), tmp_path)


@pytest.mark.parametrize("own", [[], {}, {"random": 3}], ids=str)
def test_a_ranks_own_file_that_is_none_is_refused(tmp_path: Path, own: object) -> None:
    save(learner_for(), tmp_path)
    (path,) = tmp_path.glob("checkpoints/step-*/rank-0.pt")
    torch.save(own, path)
    rewritten(tmp_path, lambda content: None)
    with pytest.raises(CheckpointError, match="does not hold what a rank saves"):
        load(learner_for(), tmp_path)


class Loud:
    def __reduce__(self) -> Any:
        return print, ("ran",)


def test_a_ranks_own_file_with_code_is_refused_without_a_word_on_how_to_run_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(learner_for(), tmp_path)
    (path,) = tmp_path.glob("checkpoints/step-*/rank-0.pt")
    torch.save({"random": Loud()}, path)
    rewritten(tmp_path, lambda content: None)
    with pytest.raises(CheckpointError, match=r"it holds .*print, which no checkpoint needs") as caught:
        load(learner_for(), tmp_path)
    assert "weights_only" not in str(caught.value)
    assert capsys.readouterr().out == ""
    pickle.loads(pickle.dumps(Loud()))
    assert capsys.readouterr().out == "ran\n", "an ordinary unpickler would have run it"


class Counting(nn.Linear):
    def get_extra_state(self) -> int:
        return 3

    def set_extra_state(self, state: int) -> None:
        assert state == 3


class CountingJob(UnevenJob):
    def build_model(self) -> nn.Module:
        return Counting(3, 1)


def test_the_extra_state_of_a_module_that_has_none_now_is_that_of_another_model(tmp_path: Path) -> None:
    save(learner_for(CountingJob()), tmp_path)
    load(learner_for(CountingJob()), tmp_path)
    with pytest.raises(CheckpointError, match="is not of this model: it has the extra state of the model itself"):
        load(learner_for(), tmp_path)

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

from launcher.checkpoint import CheckpointStore
from launcher.checkpoint.manifest import _canonical
from launcher.checkpoint.saver import Saved, Saver
from launcher.config.schema import Verify
from launcher.errors import CheckpointError, DamagedCheckpointError
from launcher.training.step import Learner
from tests.unit.learners import UnevenJob, learner_for, load, save, snapshot

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
    with pytest.raises(DamagedCheckpointError, match=r"manifest.json does not hold .*loss scale's state has the keys"):
        load(learner_for(**SCALED), tmp_path)


@pytest.mark.parametrize("own", [[], {}, {"random": 3}], ids=str)
def test_a_ranks_own_file_that_is_none_is_refused(tmp_path: Path, own: object) -> None:
    save(learner_for(), tmp_path)
    (path,) = tmp_path.glob("checkpoints/step-*/rank-0.pt")
    torch.save(own, path)
    rewritten(tmp_path, lambda content: None)
    with pytest.raises(CheckpointError, match="does not hold what a rank saves"):
        load(learner_for(), tmp_path)


ADAM: dict[str, Any] = {"optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.1}}


def crafted(folder: Path, change: Any) -> None:
    """The rank's own file as somebody else could have made it."""
    (path,) = folder.glob("checkpoints/step-*/rank-0.pt")
    own = torch.load(path, weights_only=True)
    change(own)
    torch.save(own, path)
    rewritten(folder, lambda content: None)


class Normed(UnevenJob):
    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(5))


OWN: dict[str, Any] = {
    "no words of Python's": lambda own: own["random"].pop("python"),
    "too few words of Python's": lambda own: own["random"]["python"].__setitem__(1, torch.ones(3, dtype=torch.int64)),
    "a word for a Gaussian": lambda own: own["random"]["python"].__setitem__(2, "gauss"),
    "a generator that is none": lambda own: own["random"].update(python="state"),
    "another generator of NumPy's": lambda own: own["random"]["numpy"].__setitem__(0, "PCG64"),
    "a place outside of NumPy's words": lambda own: own["random"]["numpy"].__setitem__(2, 10**9),
    "torch's generator cut": lambda own: own["random"].update(torch=own["random"]["torch"][:100]),
    "torch's generator of another type": lambda own: own["random"].update(torch=own["random"]["torch"].double()),
    "a group that is a word": lambda own: own.update(optimizer_groups=["group"]),
    "a group's parameters": lambda own: own["optimizer_groups"][0].update(params=[1]),
    "an error that is a word": lambda own: own["wire"].update({"all/weight/0": "x"}),
    "an error of two dimensions": lambda own: own["wire"].update({"all/weight/0": torch.ones(2, 2)}),
    "a weight of two numbers": lambda own: own["wire"].update({"weight/all": torch.ones(2)}),
    "a name that is a number": lambda own: own["wire"].update({3: torch.ones(2)}),
    "extra state without a name": lambda own: own["extra"].update({3: 3}),
}


@pytest.mark.parametrize("case", OWN)
def test_a_ranks_own_file_that_nobody_has_saved_so_is_damage_and_named(tmp_path: Path, case: str) -> None:
    save(learner_for(Normed(), **ADAM), tmp_path)
    load(learner_for(Normed(), **ADAM), tmp_path)
    crafted(tmp_path, OWN[case])
    before = torch.get_rng_state()
    with pytest.raises(DamagedCheckpointError, match=r"step-00000000 cannot be loaded: rank-0\.pt does not hold"):
        load(learner_for(Normed(), **ADAM), tmp_path)
    learner_for(Normed(), **ADAM)  # draws what it has drawn before
    assert torch.equal(torch.get_rng_state(), before)


OTHER: dict[str, Any] = {
    "a buffer too many": lambda own: own["buffers"].update(more=torch.ones(1)),
    "a buffer missing": lambda own: own["buffers"].pop("1.running_mean"),
    "a buffer of another shape": lambda own: own["buffers"].update({"1.running_mean": torch.ones(6)}),
    "a buffer of another sort": lambda own: own["buffers"].update({"1.running_mean": torch.ones(5, dtype=torch.int64)}),
    "a buffer that is a word": lambda own: own["buffers"].update({"1.running_mean": "mean"}),
    "a group's word for a number": lambda own: own["optimizer_groups"][0].update(eps="small"),
    "a group's tensor for a number": lambda own: own["optimizer_groups"][0].update(eps=torch.ones(2)),
    "a group's number for betas": lambda own: own["optimizer_groups"][0].update(betas=0.9),
}


@pytest.mark.parametrize("case", OTHER)
def test_what_another_learner_could_have_saved_is_no_damage_but_refused_and_named(tmp_path: Path, case: str) -> None:
    save(learner_for(Normed(), **ADAM), tmp_path)
    crafted(tmp_path, OTHER[case])
    with pytest.raises(CheckpointError, match=r"does not fit what this run builds now: .*Undo the change") as caught:
        load(learner_for(Normed(), **ADAM), tmp_path)
    assert not isinstance(caught.value, DamagedCheckpointError)


SHARED: dict[str, tuple[Any, str]] = {
    "a moment of another shape": (
        lambda tensors: tensors.update({"optimizer.weight.exp_avg": torch.ones(7)}),
        r"weight.exp_avg is a tensor \[7\] of torch.float32 instead of a tensor \[1, 3\]",
    ),
    "a moment of another sort": (
        lambda tensors: tensors.update({"optimizer.weight.exp_avg": torch.ones(1, 3, dtype=torch.complex64)}),
        "of torch.complex64 instead of",
    ),
    "a step of three numbers": (
        lambda tensors: tensors.update({"optimizer.bias.step": torch.ones(3)}),
        r"bias.step is a tensor \[3\]",
    ),
}


def saved_with(folder: Path, change: Any = lambda tensors: None, **changes: Any) -> None:
    """``save``, of other tensors than the learner has."""
    taken = snapshot(learner_for(**changes))
    change(taken.tensors)
    saver = Saver(CheckpointStore(folder / "checkpoints"), 0, 1, torch.device("cpu"))
    saver.begin(lambda: taken)
    assert isinstance(saver.settle(), Saved)


@pytest.mark.parametrize("case", SHARED)
def test_optimizer_state_of_other_shapes_is_no_damage_but_refused_and_named(tmp_path: Path, case: str) -> None:
    change, words = SHARED[case]
    saved_with(tmp_path, change, **ADAM)
    with pytest.raises(CheckpointError, match=f"does not fit what this run builds now: .*{words}") as caught:
        load(learner_for(**ADAM), tmp_path)
    assert not isinstance(caught.value, DamagedCheckpointError)


def test_an_entry_that_one_parameter_lacks_begins_anew_and_says_so(tmp_path: Path) -> None:
    saved_with(tmp_path, lambda tensors: tensors.pop("optimizer.weight.exp_avg"), **ADAM)
    learner = learner_for(**ADAM)
    _, notes = load(learner, tmp_path)
    assert notes == ["the optimizer did not keep weight.exp_avg, which begins anew"]
    for parameter in learner.optimizer.parameters:
        parameter.grad = torch.ones_like(parameter)
    learner.optimizer.optimizer.step()


def test_what_torch_cannot_load_is_damage_if_the_digests_say_so_and_else_refused(tmp_path: Path) -> None:
    save(learner_for(), tmp_path)
    (path,) = tmp_path.glob("checkpoints/step-*/rank-0.pt")
    content = path.read_bytes()
    path.write_bytes(content[:200] + bytes(len(content) - 200))
    with pytest.raises(DamagedCheckpointError, match=r"rank-0\.pt is damaged: its content is not what was written"):
        load(learner_for(), tmp_path, Verify.sizes)
    rewritten(tmp_path, lambda content: None)
    with pytest.raises(CheckpointError, match="though its files are as they were written: ") as caught:
        load(learner_for(), tmp_path)
    assert not isinstance(caught.value, DamagedCheckpointError)


def test_a_number_in_the_place_of_a_tensor_does_not_fit(tmp_path: Path) -> None:
    saved_with(tmp_path, lambda tensors: tensors.pop("optimizer.weight.step"), **ADAM)
    rewritten(tmp_path, lambda content: content["state"]["optimizer_numbers"].update({"weight.step": 3.0}))
    with pytest.raises(CheckpointError, match=r"does not fit .*weight\.step is a float instead of a tensor"):
        load(learner_for(**ADAM), tmp_path)


@pytest.mark.parametrize("scale", [0.0, -2.0, float("inf"), float("nan"), 10**400])
def test_a_loss_scale_that_nothing_can_be_scaled_with_is_damage(tmp_path: Path, scale: float) -> None:
    save(learner_for(**SCALED), tmp_path)
    rewritten(tmp_path, lambda content: content["loss_scale"].update(scale=scale))
    with pytest.raises(DamagedCheckpointError, match=r"manifest.json does not hold what belongs there"):
        load(learner_for(**SCALED), tmp_path)


def test_a_weight_of_another_sort_is_not_of_this_model(tmp_path: Path) -> None:
    saved_with(tmp_path, lambda tensors: tensors.update({"model.weight": torch.ones(1, 3, dtype=torch.int64)}))
    with pytest.raises(CheckpointError, match=r"weight is torch\.int64 there and torch\.float32 here"):
        load(learner_for(), tmp_path)


def test_what_the_optimizer_did_not_keep_before_begins_anew_and_says_so(tmp_path: Path) -> None:
    save(learner_for(**ADAM), tmp_path)
    learner = learner_for(optimizer={**ADAM["optimizer"], "amsgrad": True})
    _, notes = load(learner, tmp_path)
    assert notes == ["the optimizer did not keep max_exp_avg_sq, which begins anew"]
    for parameter in learner.optimizer.parameters:
        parameter.grad = torch.ones_like(parameter)
    learner.optimizer.optimizer.step()


def optimizer(name: str, **arguments: Any) -> dict[str, Any]:
    return {"optimizer": {"_target_": f"torch.optim.{name}", "lr": 0.1, **arguments}}


CHANGED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (optimizer("AdamW"), optimizer("AdamW", lr=0.2, betas=[0.5, 0.9], eps=1e-4, weight_decay=0.0)),
    (optimizer("AdamW"), optimizer("AdamW", amsgrad=True)),
    (optimizer("AdamW", amsgrad=True), optimizer("AdamW")),
    (optimizer("Adam"), optimizer("AdamW")),
    (optimizer("SGD"), optimizer("SGD", momentum=0.9)),
    (optimizer("SGD", momentum=0.9, nesterov=True), optimizer("SGD")),
    (optimizer("RMSprop", momentum=0.9, centered=True), optimizer("RMSprop")),
    (optimizer("RMSprop"), optimizer("RMSprop", momentum=0.9, centered=True)),
    (optimizer("AdamW", foreach=False), optimizer("AdamW", foreach=True)),
    (optimizer("AdamW", capturable=False), optimizer("AdamW", maximize=True)),
    (optimizer("ASGD"), optimizer("ASGD", t0=10)),
    (optimizer("Adafactor"), optimizer("Adafactor", beta2_decay=-0.5)),
    (optimizer("NAdam"), optimizer("NAdam", decoupled_weight_decay=True)),
    ({}, {"precision__loss_scale__enabled": True}),
    ({"precision__loss_scale__enabled": True}, {}),
    (
        {"precision__loss_scale__enabled": True},
        {
            "precision__loss_scale__enabled": True,
            "precision__loss_scale__maximum": 4.0,
            "precision__loss_scale__growth_interval": 1,
        },
    ),
    ({}, {"precision__dtype": "bfloat16"}),
    ({"precision__dtype": "bfloat16"}, {}),
    ({}, {"train__max_grad_norm": 0.5, "seed": 7}),
]


@pytest.mark.parametrize(("before", "after"), CHANGED, ids=str)
def test_no_change_of_an_option_makes_a_good_checkpoint_a_damaged_one(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    def step(learner: Learner) -> None:
        for parameter in learner.optimizer.parameters:
            parameter.grad = torch.ones_like(parameter)
        learner.optimizer.optimizer.step()

    stepped = learner_for(Normed(), **before)
    step(stepped)
    save(stepped, tmp_path)
    goes_on = learner_for(Normed(), **after)
    load(goes_on, tmp_path)
    step(goes_on)


class Strict(UnevenJob):
    def state_dict(self) -> dict[str, Any]:
        return {"seen": 3}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise KeyError("unseen")


def test_an_error_of_the_users_own_code_stays_one_and_says_what_it_was_given(tmp_path: Path) -> None:
    save(learner_for(Strict()), tmp_path)
    with pytest.raises(KeyError, match="unseen") as caught:
        load(learner_for(Strict()), tmp_path)
    assert "the job's state was taken up from" in caught.value.__notes__[0]
    assert "step-00000000" in caught.value.__notes__[0]


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

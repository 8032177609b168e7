"""What was saved on any number of ranks with any strategy loads on any other, and training goes on from there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import elastic
from tests.ranks.processes import Ranks

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(240)]

SCALED = {"precision__loss_scale__enabled": True, "precision__loss_scale__initial": 1024.0}
FP16 = {**SCALED, "precision__dtype": "float16"}
BF16 = {"precision__dtype": "bfloat16"}
SOURCES = [(1, "ddp"), (2, "zero2"), (3, "fsdp"), (4, "hsdp"), (4, "fsdp"), (3, "ddp")]
TARGETS = [(1, "fsdp"), (2, "hsdp"), (2, "ddp"), (3, "zero2"), (3, "ddp"), (4, "fsdp")]


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, Ranks]]:
    found = {size: Ranks(size) for size in (1, 2, 3, 4)}
    yield found
    for pool in found.values():
        pool.stop()


def settings(strategy: str, **more: Any) -> dict[str, Any]:
    return {"parallel__strategy": strategy, **SCALED, **more}


@pytest.fixture(scope="module")
def saved(pools: dict[int, Ranks], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, tuple[str, dict[str, Any]]]:
    found = {}
    for size, strategy in SOURCES:
        folder = str(tmp_path_factory.mktemp(f"{strategy}-{size}"))
        results = pools[size].run(elastic.save, size, folder, 5, settings(strategy))
        assert all(result == results[0] for result in results)
        found[size, strategy] = folder, results[0]
    return found


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"to {target[1]} on {target[0]}")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: f"{source[1]} on {source[0]}")
def test_a_state_is_the_same_wherever_it_is_loaded(
    pools: dict[int, Ranks], saved: dict[Any, Any], source: tuple[int, str], target: tuple[int, str]
) -> None:
    folder, there = saved[source]
    size, strategy = target
    heres = pools[size].run(elastic.load, size, folder, settings(strategy))
    total = sum(sum(here["residue"]) for here in heres)
    assert total == pytest.approx(5 * sum(range(1, source[0] + 1))), "what the next mean gains"
    for here in heres:
        assert here["state"] == there["state"]
        assert here["after"] == pytest.approx(there["after"], rel=1e-5)
        assert here["job"] == {"words": ["any", 1]}
        assert here["extra"] == "kept"
        words = f"saved on {source[0]} ranks"
        assert any(words in note for note in here["notes"]) == (size != source[0])


def test_a_checkpoint_before_the_first_step_has_adams_moments(pools: dict[int, Ranks], tmp_path: Path) -> None:
    there = pools[2].run(elastic.save, 2, str(tmp_path), 0, settings("fsdp"))[0]
    assert len(there["state"]["entries"]) == 3 * len(there["state"]["scalars"]) > 0
    assert set(there["state"]["scalars"].values()) == {0.0}
    here = pools[1].run(elastic.load, 1, str(tmp_path), settings("ddp"))[0]
    assert here["state"] == there["state"]
    assert here["after"] == pytest.approx(there["after"], rel=1e-5)


@pytest.mark.parametrize(
    ("saved_as", "loaded_as", "words"),
    [
        ({**SCALED}, {}, "the loss scale (1024) is left out"),
        ({}, {**SCALED}, "the run was float32 and had no loss scale: it starts at 1024"),
        (FP16, BF16, "the loss scale (1024) is left out"),
        (BF16, FP16, "the run was bfloat16 and had no loss scale: it starts at 1024"),
        (FP16, {}, "the loss scale (1024) is left out"),
        ({}, FP16, "the run was float32 and had no loss scale: it starts at 1024"),
    ],
)
def test_the_loss_scale_is_added_or_left_out_with_a_word(
    pools: dict[int, Ranks], tmp_path: Path, saved_as: dict[str, Any], loaded_as: dict[str, Any], words: str
) -> None:
    ddp = {"parallel__strategy": "ddp"}
    there = pools[2].run(elastic.save, 2, str(tmp_path), 2, {**ddp, **saved_as})[0]
    here = pools[2].run(elastic.load, 2, str(tmp_path), {**ddp, **loaded_as})[0]
    assert [note for note in here["notes"] if words in note]
    assert here["state"]["parameters"] == there["state"]["parameters"]
    assert here["state"]["moments"] == there["state"]["moments"]
    tolerance = 1e-4 if "precision__dtype" not in {**saved_as, **loaded_as} else 1e-2
    assert here["after"] == pytest.approx(there["after"], rel=tolerance)


def test_another_optimizer_begins_anew_with_a_word(pools: dict[int, Ranks], tmp_path: Path) -> None:
    there = pools[2].run(elastic.save, 2, str(tmp_path), 2, settings("ddp"))[0]
    sgd = {"optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}}
    here = pools[2].run(elastic.load, 2, str(tmp_path), settings("fsdp", **sgd))[0]
    assert [note for note in here["notes"] if "it is that of AdamW, and this is SGD" in note]
    assert here["state"]["parameters"] == there["state"]["parameters"]

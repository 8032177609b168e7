"""Claims that every example job has to meet."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import torch

from launcher import Job


def samples_of(job: Job, count: int) -> list[Any]:
    dataset: Any = job.build_dataset("train")
    return [dataset[index] for index in range(count)]


def assert_sums_do_not_depend_on_the_split(job: Job, samples: Sequence[Any]) -> None:
    torch.manual_seed(0)
    model = job.build_model().eval()
    cut = len(samples) // 3
    whole, *parts = (job.compute_loss(model, job.collate(some)) for some in (samples, samples[:cut], samples[cut:]))
    assert sum(int(part.items) for part in parts) == int(whole.items)
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(sum(part.metrics[name] for part in parts), value)
    assert whole.loss.dtype == torch.float32
    assert whole.loss.requires_grad
    assert not any(value.requires_grad for value in whole.metrics.values())


def assert_meta_initialisation_gives_the_same_weights(job: Job) -> None:
    torch.manual_seed(3)
    built = job.build_model()
    with torch.device("meta"):
        model = job.build_model()
    model.to_empty(device="cpu")
    module: Any
    torch.manual_seed(3)
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.reset_parameters()
    for (name, parameter), expected in zip(model.named_parameters(), built.parameters(), strict=True):
        assert parameter.equal(expected), name


def assert_survives_pickling(job: Job) -> None:
    copy = pickle.loads(pickle.dumps(job))
    assert len(copy.build_dataset("train")) == len(job.build_dataset("train"))  # type: ignore[arg-type]

"""In the steady state a step never makes the host wait for the GPU."""

from __future__ import annotations

import pytest
import torch

from launcher.training.step import train_step
from tests.unit.learners import UnevenJob, learner_for, uneven_samples

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is false: no GPU here"),
]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_steady_step_never_waits_for_the_gpu(dtype: str) -> None:
    options = {"device": "cuda", "precision__dtype": dtype, "precision__loss_scale__enabled": dtype == "float16"}
    optimizer = {"_target_": "torch.optim.AdamW", "lr": 1e-3}
    learner = learner_for(optimizer=optimizer, train__max_grad_norm=1.0, **options)
    batch = [part.cuda() for part in UnevenJob().collate(uneven_samples(8))]
    for _ in range(2):  # the first step builds states, and learns how many items to expect
        train_step(learner, [batch], stop=False).read()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ticket = train_step(learner, [batch], stop=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ticket.read().step == 3

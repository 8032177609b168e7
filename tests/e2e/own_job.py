"""A user's job, with ways to fail."""

import ctypes
import os
import shutil
import signal
import tempfile
import time

import torch
from torch import nn

from launcher import Job, LossOutput

RANK = int(os.environ.get("RANK", "0"))


class Own(Job):
    def __init__(self, fail="nothing", fail_rank=1, fail_call=5, sleep=0.0):
        self.fail, self.fail_rank, self.fail_call, self.sleep = fail, fail_rank, fail_call, sleep
        self.calls = 0

    def build_model(self):
        if self.fail == "build":
            raise ValueError("cannot build on purpose")
        return nn.Linear(4, 1)

    def build_dataset(self, split):
        if self.fail == "dataset":
            return None
        inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        return torch.utils.data.TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))

    def compute_loss(self, model, batch):
        inputs, targets = batch
        self.calls += 1
        time.sleep(self.sleep)
        if self.calls == self.fail_call and self.fail_rank in (RANK, -1):
            self._fail()
        errors = (model(inputs).float() - targets).square()
        print(f"rank {RANK} says call {self.calls}")
        return LossOutput(errors.sum(), len(inputs), {"error": errors.detach().sqrt().sum()})

    def _fail(self):
        if self.fail == "raise":
            raise ValueError("boom on purpose")
        if self.fail == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fail == "kill once" and not os.path.exists("failed"):
            open("failed", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fail == "lose tmp":
            shutil.rmtree(tempfile.gettempdir())
        if self.fail == "exit0":
            os._exit(0)
        if self.fail == "exit":
            os._exit(3)
        if self.fail == "segfault":
            ctypes.string_at(0)
        if self.fail == "raise once" and not os.path.exists("failed"):
            open("failed", "w").close()
            raise ValueError("boom once")

"""The padded job on a stream that says where it is; copied into a project's folder by tests."""

import random

import torch
from padded_job import RANK, Padded
from torch.utils.data import IterableDataset


class Stateless(IterableDataset):
    """Sequences of a rank's own, without end."""

    def __init__(self) -> None:
        self.drawn = 0

    def __iter__(self):
        while True:
            generator = torch.Generator().manual_seed(1000 * RANK + self.drawn)
            self.drawn += 1
            tokens = torch.randint(0, 17, (9,), generator=generator)
            yield tokens[:-1], torch.where(torch.arange(8) < random.randint(1, 8), tokens[1:], -100)


class Stream(Stateless):
    """The same, and where it is."""

    def state_dict(self):
        return {"drawn": self.drawn}

    def load_state_dict(self, state):
        self.drawn = state["drawn"]


class Streaming(Padded):
    """Nothing to validate on."""

    def __init__(self, stateless: bool = False, **arguments) -> None:
        super().__init__(**arguments)
        self.stateless = stateless

    def build_dataset(self, split):
        if split == "validation":
            return None
        return Stateless() if self.stateless else Stream()
